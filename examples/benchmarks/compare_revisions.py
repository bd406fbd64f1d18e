#!/usr/bin/env python
"""Is this code faster than another revision's? Both decode the same prompts in turn, in processes of their own.

    git worktree add ../before REVISION
    python examples/benchmarks/compare_revisions.py PROMPTS --before ../before --base BASE --adapter ADAPTER \\
        --output docs/results/revisions.json

PROMPTS is a JSON Lines file of conversations (`prompt`). Every method decodes each prompt once per revision, one
right after the other, and the revisions take turns in coming first. Quotes the median of the ratios. Outputs that
differ are counted: in half precision a near-tie may flip. Prints a table; the last line is one JSON document.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from report import finish

METHODS = {
    "plain": {},
    "auto": {"mtp": True},
    "quadratic": {"mtp": True, "mtp_strategy": "quadratic"},
    "linear": {"mtp": True, "mtp_strategy": "linear"},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="JSON Lines of conversations")
    parser.add_argument("--before", type=Path, help="checkout of the other revision")
    parser.add_argument("--base", required=True, help="base model: folder or Hub id")
    parser.add_argument("--adapter", required=True, type=Path, help="folder of the adapter")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--count", type=int, default=8, help="prompts (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=96, help="length of an answer at most (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of the base (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def work(args: argparse.Namespace) -> None:
    """Decodes what standard input asks for, one line at a time."""
    import time

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_mtp  # noqa: F401

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=getattr(torch, args.dtype))
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    for line in sys.stdin:
        asked = json.loads(line)
        inputs = tokenizer.apply_chat_template(
            asked["prompt"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        start = time.perf_counter()
        output = model.generate(**inputs, do_sample=False, max_new_tokens=args.new_tokens, **METHODS[asked["method"]])
        seconds = time.perf_counter() - start
        ids = output[0, inputs["input_ids"].shape[1] :].tolist()
        print(json.dumps({"seconds": seconds, "ids": ids}), flush=True)


class Revision:
    """A process that decodes with one revision's code."""

    def __init__(self, checkout: Path):
        environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
        command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def decode(self, prompt: list[dict], method: str) -> dict:
        """Ids and seconds of one answer."""
        self.process.stdin.write(json.dumps({"prompt": prompt, "method": method}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def main() -> None:
    args = parse_args()
    if args.worker:
        return work(args)
    from hf_mtp.base.machine import describe_machine

    prompts = [json.loads(line)["prompt"] for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    revisions = {"before": Revision(args.before), "now": Revision(Path(__file__).parents[2])}
    for revision in revisions.values():
        for method in METHODS:
            revision.decode(prompts[-1], method)  # warms up
    rows = {method: [] for method in METHODS}
    for number, prompt in enumerate(prompts[: args.count]):
        for method, found in rows.items():
            order = list(revisions) if number % 2 == 0 else list(revisions)[::-1]
            found.append({name: revisions[name].decode(prompt, method) for name in order})
    report = {"machine": describe_machine(), "dtype": args.dtype, "new_tokens": args.new_tokens, "methods": {}}
    for method, found in rows.items():
        ratios = [row["before"]["seconds"] / row["now"]["seconds"] for row in found]
        report["methods"][method] = row = {
            "seconds_before": statistics.median(row["before"]["seconds"] for row in found),
            "seconds_now": statistics.median(row["now"]["seconds"] for row in found),
            "faster": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "identical": sum(row["before"]["ids"] == row["now"]["ids"] for row in found),
            "prompts": len(found),
        }
        print(f"{method:10} {row['faster']:.2f}x as fast as before ({row['lowest']:.2f} to {row['highest']:.2f})")
    finish(report, args.output)


if __name__ == "__main__":
    main()
