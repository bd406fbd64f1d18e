#!/usr/bin/env python
"""Train short with one thing changed at a time, on the real model, for equal processor time.

    python examples/smollm2/recipe.py DATA answers.jsonl ../../docs/results/smollm2_recipe.json --base smollm2

Every run starts from a new adapter, the settings of `train.py` and a constant learning rate, and ends after the same
number of processor seconds. It is then measured on the base's own greedy answers to held-out prompts, by simulated
decoding with a block of masks on every token. Runs that the output file has already are kept.
"""

import argparse
import gc
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from held_out import MBPP_HELD_OUT, held_out_questions, rows_of
from prompts import HUMAN_SEEDS
from train import ADAPTER, BATCHES, SETTINGS, load_base, make_trainer, upgrade
from transformers import TrainerCallback

from hf_mtp import regenerate_responses
from hf_mtp.base.machine import describe_machine

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EVERYWHERE = {"target_modules": ATTENTION + MLP, "layers_to_transform": None}


@dataclass(frozen=True)
class Variant:
    """One run: what differs from `train.py`.

    Args:
        adapter (`dict`): Arguments of `GatedLoraConfig`.
        settings (`dict`): Arguments of `MTPConfig`.
        texts (`"own"` or `"data"`): Whether the responses are the model's own or those of the data sets.
        seed (`int`): Of the weights and of the order of the data.
    """

    adapter: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    texts: str = "own"
    seed: int = 0


VARIANTS = {
    "as in train.py": Variant(),
    "another seed": Variant(seed=1),  # what differs by chance alone
    "responses of the data": Variant(texts="data"),
    "all linear layers": Variant(adapter=EVERYWHERE),
    "attention only": Variant(adapter=EVERYWHERE | {"target_modules": ATTENTION}),
    "MLP only": Variant(adapter=EVERYWHERE | {"target_modules": MLP}),
    "upper half": Variant(adapter=EVERYWHERE | {"layers_to_transform": [*range(15, 30)]}),
    "r = 8": Variant(adapter={"r": 8, "lora_alpha": 16}),
    "r = 64": Variant(adapter={"r": 64, "lora_alpha": 128}),
    "k = 4": Variant(adapter={"k": 4}),
    "8 blocks per text": Variant(settings={"anchors_per_sequence": 8, "per_device_train_batch_size": 16}),
    "128 blocks per text": Variant(settings={"anchors_per_sequence": 128}),
    "Muon, rate 0.003": Variant(settings={"muon_learning_rate": 3e-3}),
    "Muon, rate 0.03": Variant(settings={"muon_learning_rate": 3e-2}),
    "AdamW, rate 0.002": Variant(settings={"muon": False}),
}


class ProcessorTime(TrainerCallback):
    """Ends a training after so many processor seconds, so that a busy machine treats all runs alike."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.process_time() - self.start > self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the sources")
    parser.add_argument("answers", type=Path, help="the model's own answers, as `train.py` keeps them, JSON Lines")
    parser.add_argument("output", type=Path, help="file for the numbers, JSON")
    parser.add_argument("--base", required=True, help="the model's folder")
    parser.add_argument("--seconds", type=float, default=240, help="processor time of each training (%(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts of each domain (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = {"machine": describe_machine(), "seconds": args.seconds, "prompts": args.prompts}
    runs = json.loads(args.output.read_text(encoding="utf-8"))["runs"] if args.output.is_file() else {}
    texts = {"own": rows_of(args.answers), "data": [*rows_of_data(args.data)]}
    held_out = held_out_answers(args)
    for name, variant in VARIANTS.items():
        if name not in runs:
            runs[name] = run(variant, Dataset.from_list(texts[variant.texts]), held_out, args)
            args.output.write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n", encoding="utf-8")
            print(name, runs[name], flush=True)


def rows_of_data(folder: Path):
    """Prompts with the responses that the data sets have."""
    pairs = [(row["question"], row["answer"]) for row in rows_of(folder / "gsm8k_train.jsonl")[:2000]]
    mbpp = (row for row in rows_of(folder / "mbpp.jsonl") if row["task_id"] not in MBPP_HELD_OUT)
    pairs += [(row["text"], row["code"]) for row in mbpp]
    seeds = (row for row in rows_of(folder / "chat_train.jsonl") if row["source"] in HUMAN_SEEDS)
    pairs += [(row["prompt"], row["response"]) for row in seeds]
    for prompt, response in pairs:
        yield {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": response}],
        }


def held_out_answers(args: argparse.Namespace) -> dict[str, Dataset]:
    """The base's own greedy answers to held-out prompts."""
    base, tokenizer = load_base(args.base)
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        for domain, questions in held_out_questions(args.data, args.prompts).items():
            rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in questions])
            sizes = {"batch_size": args.prompts, "max_new_tokens": 128}
            answers[domain] = regenerate_responses(base, tokenizer, rows, Path(folder) / domain, **sizes)
        return {domain: Dataset.from_list(rows.to_list()) for domain, rows in answers.items()}


def run(variant: Variant, texts: Dataset, held_out: dict[str, Dataset], args: argparse.Namespace) -> dict:
    """Trains and measures one variant."""
    base, tokenizer = load_base(args.base)
    model = upgrade(base, ADAPTER | variant.adapter, variant.seed)
    steady = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 8, "save_strategy": "no"}
    quiet = {"disable_tqdm": True, "logging_steps": 1, "training_curves": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            model, tokenizer, texts.shuffle(variant.seed), Path(folder), 600,
            SETTINGS | BATCHES["cpu"] | steady | quiet | variant.settings,
            eval_dataset=held_out, callbacks=[ProcessorTime(args.seconds)], seed=variant.seed,
        )  # fmt: skip
        trainer.train()
        metrics = trainer.evaluate()
    log = [entry for entry in trainer.state.log_history if "mask_tokens" in entry]
    result = {
        "adapter": variant.adapter,
        "settings": variant.settings,
        "texts": variant.texts,
        "steps": trainer.state.global_step,
        "masks_trained": round(sum(entry["mask_tokens"] for entry in log)),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens_per_pass": {name: round(metrics[f"eval_{name}_tokens_per_pass"], 3) for name in held_out},
    }
    del trainer, model
    gc.collect()
    return result


if __name__ == "__main__":
    main()
