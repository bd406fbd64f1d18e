#!/usr/bin/env python
"""Measure the reference adapter: correctness first, then tokens per pass, on held-out text of three domains.

    python examples/benchmarks/measure_reference.py --base BASE --data DATA --adapter out/reference \\
        --output docs/results/reference.json

For each domain: greedy decoding with and without `mtp=True`, quadratic and linear, identical or not, with the share of
repeated 4-grams beside every figure, and what an evaluation foresees for the very answers; and the simulated tokens
per step on held-out text, the base's own argmax being the truth. float32. Prints a table; the last line is one JSON
document.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from reference_data import DOMAINS, test_dataset
from report import finish
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mtp import MTPConfig, MTPTrainer
from hf_mtp.base.machine import describe_machine
from hf_mtp.evaluation.compare import decode_both_ways, summarize
from hf_mtp.evaluation.speed.simulated import simulated_decoding

STRATEGIES = ("quadratic", "linear")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="base model: folder or Hub id")
    parser.add_argument("--data", required=True, type=Path, help="folder with the text")
    parser.add_argument("--adapter", required=True, type=Path, help="folder of the adapter")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--prompts", type=int, default=40, help="held-out examples per domain")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--simulate-only", action="store_true", help="no decoding: for ablations")
    return parser.parse_args()


def simulated(model: PeftModel, tokenizer, dataset, folder: Path) -> dict[str, float]:
    """Tokens per pass and per block, and accuracy per position, on held-out text, a block on every token."""
    trainer = MTPTrainer(
        model=model,
        args=MTPConfig(
            output_dir=str(folder / "evaluation"),
            per_device_eval_batch_size=4,
            training_curves=False,
            max_length=384,
            bf16=False,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate(dataset)
    wanted = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return {name: round(value, 4) for name, value in wanted.items() if name.startswith(("tokens_per", "accuracy"))}


def decoded(model: PeftModel, tokenizer, dataset, args: argparse.Namespace) -> dict[str, dict]:
    """Both strategies over the prompts of a dataset."""
    prompts = [tokenizer(row["prompt"]).input_ids for row in dataset]
    results = {}
    for strategy in tqdm(STRATEGIES, leave=False):
        pairs = decode_both_ways(model, prompts, args.new_tokens, mtp_strategy=strategy)
        results[strategy] = {
            name: round(value, 4) if isinstance(value, float) else value for name, value in summarize(pairs).items()
        }
        if strategy == "quadratic":
            texts = [(ids, each.mtp.rows[0]) for ids, each in zip(prompts, pairs, strict=True)]
            simulated = simulated_decoding(model, texts)
            results[strategy]["foreseen_tokens_per_pass"] = round(simulated.tokens_per_pass, 4)
    return results


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    training = json.loads((args.adapter / "training.json").read_text(encoding="utf-8"))
    report = {
        "machine": describe_machine(),
        "training": {name: value for name, value in training.items() if name != "log"},
        "prompts": args.prompts,
        "new_tokens": args.new_tokens,
        "domains": {},
    }
    for domain in DOMAINS:
        dataset = test_dataset(args.data, tokenizer, domain, args.prompts)
        result = {"simulated": simulated(model, tokenizer, dataset, args.adapter)}
        if not args.simulate_only:
            result |= decoded(model, tokenizer, dataset, args)
        report["domains"][domain] = result
        print_rows(domain, result)
    finish(report, args.output)


def print_rows(domain: str, result: dict) -> None:
    print(f"{domain:8} simulated on held-out text: {result['simulated']['tokens_per_pass']:.2f} tokens per pass")
    for strategy in STRATEGIES:
        if strategy in result:
            row = result[strategy]
            print(
                f"{domain:8} {strategy:9} {row['tokens_per_pass']:.2f} tokens per pass, {row['speedup']:.2f}x plain's "
                f"speed, {row['identical']}/{row['prompts']} identical, repeated 4-grams {row['repeated_4grams']:.2f}"
            )


if __name__ == "__main__":
    main()
