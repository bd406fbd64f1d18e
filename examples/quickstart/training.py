"""Training for a given time: the quickstart's [`MTPTrainer`], and how far it is.

Knows how to train an upgraded model on rows of text. Knows nothing of where these come from or what is measured later.
"""

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from hf_mtp import MTPConfig, MTPTrainer
from hf_mtp.base.machine import bfloat16_is_faster


class Report(TrainerCallback):
    """Tells how far a training is.

    Args:
        trainer ([`MTPTrainer`]): The training.
        show (`Callable`): Called after each step, and when there is news, with the share of training that is over,
            from 0 to 1, and the latest metrics, of which there are none at first.
    """

    def __init__(self, trainer: MTPTrainer, show: Callable[[float, dict[str, float]], None]):
        self.trainer, self.show = trainer, show
        self.metrics: dict[str, float] = {}

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= self.share >= 1  # the last metrics are the ones to show
        self.show(self.share, self.metrics)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:  # not the summary at the end
            self.metrics = logs
            self.show(self.share, logs)

    @property
    def share(self) -> float:
        """How much of the training is over, by the clock or by the steps, whichever is further."""
        return max(self.trainer.deadline.share, self.trainer.state.global_step / self.trainer.state.max_steps)


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    output: Path,
    minutes: float,
    max_steps: int | None,
) -> MTPTrainer:
    """A trainer of `model`'s adapter on conversational prompt-completion `rows`, ready to run.

    Batches are small: within a few minutes, many steps are worth more than smooth ones.
    """
    args = MTPConfig(
        output_dir=str(output),
        num_train_epochs=1000,  # the clock ends it
        max_steps=max_steps or -1,
        max_minutes=minutes,
        per_device_train_batch_size=4,
        anchors_per_sequence=32,
        max_length=320,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        use_cpu=True,
        bf16=bfloat16_is_faster(),
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    dataset = Dataset.from_list(rows).shuffle(seed=0)
    if max_steps is not None:
        dataset = dataset.take(min(len(rows), max_steps * args.per_device_train_batch_size))  # no more are read
    trainer = MTPTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer
