#!/usr/bin/env python
"""Upgrade a base model, train its adapter and save it, on as many processes as `accelerate launch` starts.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/accelerate/train.py \\
        --base Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --output out/adapter

Without --base and --dataset: the quickstart's small base and its text, offline. Every argument of `MTPConfig` can be
given as `--set name=value`. The last checkpoint in the output folder, if any, is resumed.
"""

import argparse
import ast
from pathlib import Path

from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from hf_mtp import GatedLoraConfig, MTPConfig, MTPTrainer

QUICKSTART = Path(__file__).resolve().parents[1] / "quickstart"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(QUICKSTART / "base"), help="base model: folder or Hub id")
    parser.add_argument("--dataset", default=str(QUICKSTART / "data" / "maths_train.jsonl"), help="file or Hub id")
    parser.add_argument("--output", default="out/adapter", help="folder for checkpoints and the adapter")
    parser.add_argument("--k", type=int, default=8, help="mask tokens")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of MTPConfig")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    settings = {name: ast.literal_eval(value) for name, _, value in (pair.partition("=") for pair in args.set)}
    # Before the model: ZeRO-3 spreads its weights while they are loaded.
    config = MTPConfig(args.output, **{"max_length": 512, "save_steps": 200, "logging_steps": 10, **settings})
    if Path(args.dataset).is_file():
        dataset = load_dataset("json", data_files=args.dataset, split="train")
    else:
        dataset = load_dataset(args.dataset, split="train")

    base = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto")
    model = get_peft_model(base, GatedLoraConfig(k=args.k, r=args.rank, lora_alpha=2 * args.rank))
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    trainer = MTPTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output) if Path(args.output).is_dir() else None)
    trainer.save_model()
    # A process that exits before its communication threads may be aborted. They end with the process group, once the
    # wrapped model, which the trainer holds, is gone.
    accelerator = trainer.accelerator
    del trainer
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main()
