#!/usr/bin/env python
"""Train the reference adapter: all three domains, a given time, one machine.

    python examples/benchmarks/train_reference.py --base BASE --data DATA --output out/reference --minutes 30

BASE is a local folder or a Hub id, DATA a folder as docs/benchmarks.md describes. Every argument of `MTPConfig` can
be given as `--set name=value`, and of `GatedLoraConfig` as `--adapter name=value`. Writes the adapter and
`training.json`: arguments, machine, versions, seconds, masks trained on, and the losses along the way.
"""

import argparse
import ast
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from reference_data import train_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hf_mtp import GatedLoraConfig, MTPConfig, MTPTrainer
from hf_mtp.base.machine import describe_machine


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="base model: folder or Hub id")
    parser.add_argument("--data", required=True, type=Path, help="folder with the text")
    parser.add_argument("--output", required=True, type=Path, help="folder for the adapter")
    parser.add_argument("--minutes", type=float, default=30, help="training time")
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapter", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of GatedLoraConfig")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of MTPConfig")
    return parser.parse_args()


def named_values(pairs: list[str]) -> dict:
    """`["r=16", "targets='data'"]` as a dictionary of Python values."""
    return {name: ast.literal_eval(value) for name, _, value in (pair.partition("=") for pair in pairs)}


# A rank that is small beside the model's width of 320: LoRA's cost in decoding grows with it.
ADAPTER = {"k": 8, "r": 32, "lora_alpha": 64}
# Else the defaults.
SETTINGS = {"per_device_train_batch_size": 4, "bf16": True, "max_length": 384}


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    output: Path,
    settings: dict,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> dict:
    """Trains for so many minutes or steps; returns settings, machine, seconds, masks trained on and the log."""
    trainer = MTPTrainer(
        model=model,
        args=MTPConfig(
            output_dir=str(output),
            num_train_epochs=1000,  # the clock ends it
            max_steps=steps or -1,
            max_minutes=None if steps else minutes,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            save_strategy="no",
            logging_steps=25,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            **settings,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    before = time.process_time()
    result = trainer.train()
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # what follows is not in bfloat16
    logs = [entry for entry in trainer.state.log_history if "tokens_per_pass" in entry]
    return {
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "minutes": minutes,
        "seconds": round(result.metrics["train_runtime"], 1),
        "cpu_seconds": round(time.process_time() - before, 1),
        "settings": settings,
        "recipe": vars(trainer.recipe),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "masks_trained": round(sum(entry["mask_tokens"] for entry in logs) * trainer.args.logging_steps),
        "log": logs,
    }


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    adapter = {**ADAPTER, **named_values(args.adapter)}
    model = get_peft_model(base, GatedLoraConfig(**adapter))
    dataset = train_dataset(args.data, tokenizer, sequences=16_000, seed=args.seed)
    settings = {**SETTINGS, **named_values(args.set)}
    record = train(
        model, tokenizer, dataset, args.output, settings, minutes=args.minutes, steps=args.steps, seed=args.seed
    )
    record |= {"adapter": adapter}
    model.save_pretrained(args.output)
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in record.items() if name != "log"}))


if __name__ == "__main__":
    main()
