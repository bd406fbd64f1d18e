#!/usr/bin/env python
"""Time `generate(mtp=True)` against the other exact decoding methods: same prompts, same run, whole generations.

    python examples/benchmarks/measure_decoding.py --base BASE --draft DRAFT --data DATA --adapter out/reference \\
        --output docs/results/decoding.json

Batch 1: greedy on maths, sampling at temperature 0.7 on chat and Python; plain decoding, prompt lookup, an assistant
model, and the strategies of hf_mtp, in turns. Batches of 4 and 16: plain and automatic. An untrained adapter. Greedy
outputs are compared with plain decoding's token by token. The base, with and without adapters, is one set of weights:
where weights lie in memory would make two copies differ by some percent.
Prints tables; the last line is one JSON document.
"""

import argparse
import statistics
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from reference_data import test_dataset
from report import finish
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mtp import GatedLoraConfig
from hf_mtp.base.machine import describe_machine
from hf_mtp.evaluation.compare import same_weights
from hf_mtp.evaluation.decoded import timed_generate

DOMAINS = {"maths": {"do_sample": False}, **dict.fromkeys(("chat", "python"), {"do_sample": True, "temperature": 0.7})}
WARM_UP = 3  # prompts that are decoded before any is timed
IN_BATCHES = 64  # prompts that batches are made of


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="base model: folder or Hub id")
    parser.add_argument("--draft", required=True, help="assistant model: folder or Hub id")
    parser.add_argument("--data", required=True, type=Path, help="folder with the text")
    parser.add_argument("--adapter", required=True, type=Path, help="folder of the adapter")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--prompts", type=int, default=16, help="held-out examples per domain")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args()


class Timing:
    """Seconds, tokens and forward passes of one decoding method."""

    def __init__(self):
        self.seconds, self.tokens, self.passes, self.identical = [], [], [], 0

    def add(self, seconds: float, tokens: int, passes: int, identical: bool) -> None:
        self.seconds.append(seconds)
        self.tokens.append(tokens)
        self.passes.append(passes)
        self.identical += identical

    def summary(self, plain: "Timing") -> dict:
        """Against plain decoding: medians of the prompts' own ratios of seconds per token."""
        pace = [seconds / tokens for seconds, tokens in zip(self.seconds, self.tokens, strict=True)]
        plain_pace = [seconds / tokens for seconds, tokens in zip(plain.seconds, plain.tokens, strict=True)]
        return {
            "tokens_per_second": round(sum(self.tokens) / sum(self.seconds), 2),
            "speedup": round(statistics.median(p / own for p, own in zip(plain_pace, pace, strict=True)), 4),
            "speedup_in_total": round(
                sum(plain.seconds) / sum(plain.tokens) * sum(self.tokens) / sum(self.seconds), 4
            ),
            "tokens_per_pass": round(sum(self.tokens) / sum(self.passes), 4),
            "identical": self.identical,
        }


def compare(methods: dict, batches: list[dict], **arguments) -> dict[str, dict]:
    """Decodes every batch with every method, in turns, and sums up. `methods` are (model, arguments), plain first."""
    timings = {name: Timing() for name in methods}
    names = list(methods)
    warm_up = batches[:WARM_UP]
    for index, inputs in enumerate(tqdm(warm_up + batches, leave=False)):
        done = {}
        for name in names[index % len(names) :] + names[: index % len(names)]:
            torch.manual_seed(index)
            model, own = methods[name]
            done[name] = timed_generate(model, **inputs, **{**arguments, **own})
        if index < len(warm_up):
            continue
        for name, (new, passes, seconds) in done.items():
            tokens = int((new != arguments["pad_token_id"]).sum())
            timings[name].add(seconds, tokens, passes, torch.equal(new, done["plain"][0]))
    return {name: timing.summary(timings["plain"]) for name, timing in timings.items()}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.base, padding_side="left")
    base, draft = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval() for name in (args.base, args.draft)
    )
    model = PeftModel.from_pretrained(same_weights(base), args.adapter).eval()
    config = model.peft_config["default"]
    fresh = GatedLoraConfig(k=config.k, r=config.r, lora_alpha=config.lora_alpha)
    untrained = get_peft_model(same_weights(base), fresh).eval()
    common = {"max_new_tokens": args.new_tokens, "pad_token_id": tokenizer.pad_token_id, "top_k": 0}
    methods = {
        "plain": (base, {}),
        "prompt lookup": (base, {"prompt_lookup_num_tokens": 10}),
        "assistant model": (base, {"assistant_model": draft}),
        "auto": (model, {"mtp": True}),
        "quadratic": (model, {"mtp": True, "mtp_strategy": "quadratic"}),
        "linear": (model, {"mtp": True, "mtp_strategy": "linear"}),
    }
    prompts = {
        domain: [
            row["prompt"] for row in test_dataset(args.data, tokenizer, domain, max(IN_BATCHES, 2 * args.prompts))
        ]
        for domain in DOMAINS
    }
    report = {
        "machine": describe_machine(),
        "arguments": {"prompts": args.prompts, "new_tokens": args.new_tokens, "k": config.k, "r": config.r},
        "domains": {},
        "batches": {},
    }

    def tokenized(texts: list[str]) -> dict:
        return dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))

    for domain, sampling in DOMAINS.items():
        batches = [tokenized([text]) for text in prompts[domain][: args.prompts]]
        report["domains"][domain] = {**sampling, "methods": compare(methods, batches, **common, **sampling)}
        print_rows(domain, report["domains"][domain]["methods"], len(batches))

    maths = [tokenized([text]) for text in prompts["maths"][: args.prompts]]
    report["untrained"] = compare({"plain": methods["plain"], "auto": (untrained, {"mtp": True})}, maths, **common)
    print_rows("untrained adapter", report["untrained"], len(maths))
    hot = {"plain": (base, {}), "quadratic": methods["quadratic"]}
    maths += [tokenized([text]) for text in prompts["maths"][args.prompts : 2 * args.prompts]]  # chance needs more
    report["temperature 1"] = compare(hot, maths, **common, do_sample=True)
    print_rows("maths, T = 1", report["temperature 1"], len(maths))
    for size in (4, 16):
        batches = [tokenized(prompts["maths"][start : start + size]) for start in range(0, IN_BATCHES, size)]
        pair = {name: methods[name] for name in ("plain", "auto")}
        report["batches"][str(size)] = compare(pair, batches, **common)
        print_rows(f"maths, batch {size}", report["batches"][str(size)], len(batches))
    finish(report, args.output)


def print_rows(title: str, methods: dict[str, dict], batches: int) -> None:
    for name, row in methods.items():
        print(
            f"{title:18} {name:16} {row['speedup']:.2f}x plain ({row['speedup_in_total']:.2f}x in total), "
            f"{row['tokens_per_pass']:.2f} tokens per pass, {row['identical']}/{batches} identical",
            flush=True,
        )


if __name__ == "__main__":
    main()
