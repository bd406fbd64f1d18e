"""Training for a given time: the quickstart's [`MTPTrainer`], its clock and its learning rate.

Knows how to train an upgraded model on rows of text. Knows nothing of where these come from or what is measured later.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from hf_mtp import MTPConfig, MTPTrainer

WARMUP_SHARE = 0.03
NO_LIMIT = 1_000_000  # steps; the clock stops long before


class Clock(TrainerCallback):
    """Ends training when its time is over (or its steps), with a learning rate that has then come down to zero.

    Args:
        minutes (`float`): Time from the first step on.
        max_steps (`int`): Number of steps at most.

    Attributes:
        report (`Callable`): Called after each step, and when there is news, with the share of training that is over,
            from 0 to 1, and the latest metrics, of which there are none at first.
    """

    report: Callable[[float, dict[str, float]], None] = staticmethod(lambda share, metrics: None)

    def __init__(self, minutes: float, max_steps: int):
        self.seconds, self.max_steps = 60 * minutes, max_steps
        self.start = math.inf
        self.metrics: dict[str, float] = {}

    def share(self, steps: int) -> float:
        """How much of training is over after so many steps."""
        return min(1.0, max((time.perf_counter() - self.start) / self.seconds, steps / self.max_steps))

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_share(self.share(state.global_step))

    def on_step_end(self, args, state, control, **kwargs):
        share = self.share(state.global_step)
        control.should_log |= share >= 1
        control.should_training_stop |= share >= 1
        self.report(share, self.metrics)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:  # not the summary at the end
            logs.pop("learning_rate", None)  # the scheduler's, which is not the one in use
            self.metrics = logs
            self.report(self.share(state.global_step), logs)


def learning_rate_share(done: float) -> float:
    """A short linear warm-up, then a cosine down to zero, by the share of training that is over."""
    return min(1.0, (done + 1e-3) / WARMUP_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    output: Path,
    minutes: float,
    max_steps: int | None,
) -> tuple[MTPTrainer, Clock]:
    """A trainer of `model`'s adapter on conversational prompt-completion `rows`, ready to run, and its clock.

    Batches are small: within a few minutes, many steps are worth more than smooth ones.
    """
    args = MTPConfig(
        output_dir=str(output),
        max_steps=max_steps or NO_LIMIT,
        per_device_train_batch_size=4,
        anchors_per_sequence=32,
        max_length=320,
        learning_rate=2e-3,
        lr_scheduler_type="constant",  # the clock sets the rate
        use_cpu=True,
        bf16=bfloat16_is_faster(),
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    clock = Clock(minutes, args.max_steps)
    trainer = MTPTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows).shuffle(seed=0),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def bfloat16_is_faster(size: int = 1024, repeats: int = 8) -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones, found by trying."""

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.randn(2, size, size).to(dtype)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < seconds(torch.float32)
