"""Trains a gated LoRA, Medusa-style heads and an EAGLE-style head on the same answers for the same processor time.

Processor time, so that a busy machine treats all alike; on one thread of a quiet machine it is the time on the clock.
All learn from four of the same texts at a time, by Muon for matrices and AdamW for the rest, with a learning rate that
rises for 3 % of the time and then falls as a cosine. The base's passes over the texts count as training time.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from datasets import Dataset
from eagle_head import EagleHead
from medusa_heads import MedusaHeads
from safetensors.torch import load_file, save_file
from torch import nn
from train import ADAPTER, SETTINGS, load_base, make_trainer, upgrade

from hf_mtp.base.inspection import decoder_of
from hf_mtp.evaluation.suites.rows import read_rows
from hf_mtp.training.callbacks.deadline import SCHEDULE_STEPS, Deadline
from hf_mtp.training.optimizer import Muon

TRAINED = ("ours", "medusa", "eagle")
K = 4  # masks of our adapter, and Medusa-style heads
TEXTS = 4  # per step
MAX_LENGTH = 640  # tokens
WARM_UP = 0.03
PEERS = {"medusa": lambda base: MedusaHeads(base, K), "eagle": EagleHead}
# Muon's and AdamW's: the best of trials of 15 seconds on the quickstart's base.
RATES = {"medusa": (2e-2, 2e-3), "eagle": (2e-2, 1e-3)}
OURS = {"anchors_per_sequence": 16, "per_device_train_batch_size": TEXTS, "masks_per_part": 1024}


class ProcessorClock(Deadline):
    """Ends a training after so many minutes of processor time. The learning rate follows them."""

    @property
    def share(self) -> float:
        return min(1.0, max(0.0, (time.process_time() - self.start) / self.seconds))

    def begin(self) -> "ProcessorClock":
        self.start, self.on_the_clock = time.process_time(), time.monotonic()
        return self

    def passed(self) -> dict[str, float]:
        """Minutes since the beginning: of the processor, and on the clock."""
        seconds = {
            "minutes": time.process_time() - self.start,
            "minutes_on_the_clock": time.monotonic() - self.on_the_clock,
        }
        return {name: round(passed / 60, 2) for name, passed in seconds.items()}

    def on_train_begin(self, args, state, control, lr_scheduler, **kwargs):
        self.begin().follow_clock(lr_scheduler)


def train_missing(base: str, answers: Path, folder: Path, minutes: float, seed: int = 0) -> None:
    """Trains what is not in the folder yet, one after the other. A training that was interrupted begins again."""
    rows = read_rows(answers)
    for name in TRAINED:
        if not (folder / name / "record.json").is_file():
            print(f"Training {name}: {minutes} minutes of processor time.", flush=True)
            train = train_ours if name == "ours" else train_peer
            record = {"texts": len(rows)} | train(name, base, rows, folder / name, minutes, seed)
            (folder / name / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def train_ours(name: str, base: str, rows: list[dict], folder: Path, minutes: float, seed: int) -> dict:
    """A small gated-LoRA adapter, by the training of examples/smollm2."""
    model, tokenizer = load_base(base)
    model = upgrade(model, ADAPTER | {"k": K, "layers_to_transform": None}, seed)
    settings = SETTINGS | OURS | {"max_steps": SCHEDULE_STEPS, "save_strategy": "no", "training_curves": False}
    texts, clock = Dataset.from_list(rows).shuffle(seed), ProcessorClock(minutes)
    trainer = make_trainer(model, tokenizer, texts, folder, None, settings, callbacks=[clock], seed=seed)
    trainer.train()
    passed = clock.passed()
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).save_pretrained(folder / "adapter")
    log = [entry for entry in trainer.state.log_history if "tokens_per_pass" in entry]
    return {"parameters": trainable(model), "steps": trainer.state.global_step, **passed, "log": log}


def train_peer(name: str, base: str, rows: list[dict], folder: Path, minutes: float, seed: int) -> dict:
    """A peer's head, by its own `learn`."""
    model, tokenizer = load_base(base)
    model.requires_grad_(False).eval()
    torch.manual_seed(seed)
    head = PEERS[name](model).to(model.device).train()
    batches = shuffled_batches(rows, tokenizer, seed)
    clock = ProcessorClock(minutes)
    log = learn(head, model, batches, clock, *RATES[name])
    passed = clock.passed()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(head.state_dict(), folder / "head.safetensors")
    return {"parameters": trainable(head), "steps": len(log), **passed, "log": log}


def load_peer(name: str, base, folder: Path) -> nn.Module:
    """A trained head in the dtype of the base."""
    head = PEERS[name](base)
    head.load_state_dict(load_file(folder / name / "head.safetensors"))
    return head.to(base.device, base.dtype).eval()


def trainable(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def learn(
    head: nn.Module, base, batches: Iterator, clock: ProcessorClock, muon_rate: float, rate: float
) -> list[dict]:
    """Trains a head until the time is over. Returns what each step reports.

    Args:
        head ([`torch.nn.Module`]): Its `learn` adds the gradients of a step.
        base ([`~transformers.PreTrainedModel`]): The frozen base.
        batches (`Iterator`): Pairs `(B, T)` of token ids, and of which tokens are the model's own.
        clock ([`ProcessorClock`]): Says how much time has passed.
        muon_rate, rate (`float`): Learning rates of matrices and of the rest.
    """
    matrices = [parameter for parameter in head.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in head.parameters() if parameter.dim() != 2]
    optimizers = [(Muon(matrices, lr=muon_rate), muon_rate), (torch.optim.AdamW(others, weight_decay=0.0), rate)]
    log = []
    clock.begin()
    while clock.share < 1:
        ids_BT, is_answer_BT = (tensor.to(base.device) for tensor in next(batches))
        with torch.no_grad():
            state_BTD = decoder_of(base)(input_ids=ids_BT, use_cache=False).last_hidden_state
        with torch.autocast(base.device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16):
            report = head.learn(base, ids_BT, state_BTD, is_answer_BT)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * warm_cosine(clock.share)
            optimizer.step()
            optimizer.zero_grad()
        log.append({name: round(value, 4) for name, value in report.items()} | {"share": round(clock.share, 3)})
        print(log[-1], flush=True)
    return log


def warm_cosine(share: float) -> float:
    """The learning rate over its peak, after a share of the time."""
    if share < WARM_UP:
        return share / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def shuffled_batches(rows: list[dict], tokenizer, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`(B, T)` token ids, padded on the right, and which of them the model wrote, without end.

    Later tokens do not reach earlier ones, so padding needs no mask.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order) - TEXTS + 1, TEXTS):
            texts = [encoded(rows[index], tokenizer) for index in order[start : start + TEXTS]]
            ids, answers = zip(*texts, strict=True)
            pad = {"batch_first": True, "padding_value": 0}
            yield nn.utils.rnn.pad_sequence(ids, **pad), nn.utils.rnn.pad_sequence(answers, **pad)


def encoded(row: dict, tokenizer) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """`(T,)`, `(T,)`: the ids of a conversation, and which of them are the answer."""
    options: dict[str, Callable | bool] = {"return_dict": True}
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], **options)["input_ids"][:MAX_LENGTH]
    asked = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)["input_ids"])
    return torch.tensor(whole), torch.arange(len(whole)) >= asked
