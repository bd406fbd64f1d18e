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
from pathlib import Path

import torch
from peft import get_peft_model
from reference_data import train_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mtp import GatedLoraConfig, MTPConfig, MTPTrainer
from hf_mtp.measuring import describe_machine


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


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    # A rank that is small beside the model's width of 320: LoRA's cost in decoding grows with it.
    adapter = {"k": 8, "r": 32, "lora_alpha": 64, **named_values(args.adapter)}
    model = get_peft_model(base, GatedLoraConfig(**adapter))

    settings = {
        # Small steps, many of them: in half an hour on a CPU the number of steps is what is scarce.
        "learning_rate": 5e-3,
        "muon": True,
        "targets": "soft",
        # The sampler head makes the drafts; latent consistency sees to it that masks can be unembedded without it.
        "base_weight": 0.0,
        "lcm_weight": 3.0,
        "position_decay": 0.8,
        "per_device_train_batch_size": 4,
        "anchors_per_sequence": 48,
        "bf16": True,
        "gradient_checkpointing": False,
        "torch_compile": True,
        "max_length": 384,
        **named_values(args.set),
    }
    trainer = MTPTrainer(
        model=model,
        args=MTPConfig(
            output_dir=str(args.output),
            num_train_epochs=1000,  # the clock ends it
            max_steps=args.steps or -1,
            max_minutes=None if args.steps else args.minutes,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            save_strategy="no",
            logging_steps=25,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            seed=args.seed,
            **settings,
        ),
        train_dataset=train_dataset(args.data, tokenizer, sequences=16_000, seed=args.seed),
        processing_class=tokenizer,
    )
    result = trainer.train()
    model.save_pretrained(args.output)
    logs = [entry for entry in trainer.state.log_history if "tokens_per_step" in entry]
    record = {
        "machine": describe_machine(),
        "threads": args.threads,
        "minutes": args.minutes,
        "seconds": round(result.metrics["train_runtime"], 1),
        "adapter": adapter,
        "settings": settings,
        "recipe": vars(trainer.recipe),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "masks_trained": round(sum(entry["mask_tokens"] for entry in logs) * trainer.args.logging_steps),
        "log": logs,
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in record.items() if name != "log"}))


if __name__ == "__main__":
    main()
