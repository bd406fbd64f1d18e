#!/usr/bin/env python
"""Measure the adapter's speed: every prompt decoded plainly, by `mtp=True` and by prompt lookup, in turn.

    python examples/smollm2/speed.py DATA out/adapter docs/results/smollm2.json --base smollm2

Greedy, batch 1, in the dtype that the base is stored in, on held-out prompts. The ways take turns in coming first. A
speedup is the median over prompts of a prompt's own ratio to plain decoding, by the wall clock, the prompt's pass
included. Close everything else that computes. Prints a table; the file has the numbers of every prompt.
"""

import argparse
import json
import statistics

import torch
from measure import encoded, held_out_questions, parser_of
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mtp.evaluation.compare import Decoded, decode, describe_machine, repeated_share

WAYS = {
    "plain": {},
    "auto": {"mtp": True},
    "quadratic": {"mtp": True, "mtp_strategy": "quadratic"},
    "linear": {"mtp": True, "mtp_strategy": "linear"},
    "prompt lookup": {"prompt_lookup_num_tokens": 8},
}


def parse_args() -> argparse.Namespace:
    parser = parser_of(__doc__, prompts=40)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    questions = held_out_questions(args.data, args.prompts)
    warm = encoded("What is 2 + 3?", tokenizer)
    for options in WAYS.values():
        decode(model, warm, 24, **options)
    answers = {domain: [] for domain in questions}
    for number, turn in enumerate(zip(*questions.values(), strict=True)):
        for domain, question in zip(questions, turn, strict=True):
            prompt, first = encoded(question, tokenizer), number % len(WAYS)
            order = [*WAYS][first:] + [*WAYS][:first]
            found = {way: decode(model, prompt, args.new_tokens, **WAYS[way]) for way in order}
            answers[domain].append(found)
        write(args, base, answers)
    print_table(json.loads(args.output.read_text(encoding="utf-8"))["domains"])


def write(args: argparse.Namespace, base, answers: dict[str, list[dict[str, Decoded]]]) -> None:
    """Writes what is measured so far."""
    report = {
        "machine": describe_machine(),
        "dtype": str(base.dtype).removeprefix("torch."),
        "new_tokens": args.new_tokens,
        "prompts": len(answers["maths"]),
        "domains": {domain: {way: summary(found, way) for way in WAYS} for domain, found in answers.items()},
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def summary(found: list[dict[str, Decoded]], way: str) -> dict:
    """One way on one domain, and the speedup of every prompt."""
    speedups = [row["plain"].seconds / row[way].seconds for row in found]
    return {
        "tokens_per_pass": round(
            sum(len(row[way].ids) for row in found) / sum(row[way].forward_passes for row in found), 3
        ),
        "speedup": round(statistics.median(speedups), 3),
        "seconds": round(sum(row[way].seconds for row in found), 2),
        "identical": sum(row[way].ids == row["plain"].ids for row in found),
        "repeated_4grams": round(statistics.fmean(repeated_share(row[way].ids) for row in found), 3),
        "speedups": [round(speedup, 3) for speedup in speedups],
    }


def print_table(domains: dict[str, dict[str, dict]]) -> None:
    for domain, ways in domains.items():
        for way, row in ways.items():
            numbers = f"{row['speedup']:.2f}x, {row['tokens_per_pass']:.2f} tokens per pass"
            print(f"{domain:6} {way:14} {numbers}, {row['identical']} texts as plain")


if __name__ == "__main__":
    main()
