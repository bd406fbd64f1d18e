#!/usr/bin/env python
"""Measure the adapter: tokens per forward pass on held-out prompts, and whether the text is the base's own.

    python examples/smollm2/measure.py DATA out/adapter measured.json --base smollm2

Greedy, batch 1, the base in the type that it is stored in, each prompt once plainly and once by `mtp=True`. With
`--card` the numbers go into the adapter's config and model card.
"""

import argparse
import json
from pathlib import Path

import torch
from held_out import MBPP_HELD_OUT, rows_of
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mtp import GatedLoraConfig
from hf_mtp.adapter.card import write_model_card
from hf_mtp.evaluation.compare import Record, compare, decode, describe_machine, summarize

DOMAINS = {"maths": "maths (GSM8K)", "code": "code (MBPP)", "chat": "chat"}


def parser_of(description: str, prompts: int) -> argparse.ArgumentParser:
    """The arguments of a script that decodes held-out prompts with the adapter."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the held-out sets")
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument("output", type=Path, help="file for the numbers, JSON")
    parser.add_argument("--base", required=True, help="the model's folder")
    parser.add_argument("--prompts", type=int, default=prompts, help="prompts of each domain (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="length of an answer at most (%(default)s)")
    return parser


def main() -> None:
    parser = parser_of(__doc__, prompts=20)
    parser.add_argument("--strategy", default="quadratic", choices=("quadratic", "linear", "auto"))
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--card", action="store_true", help="write the numbers into the adapter's card")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = PeftModel.from_pretrained(base, args.adapter).to(device).eval()
    questions = held_out_questions(args.data, args.prompts)
    records = {domain: [] for domain in questions}
    for turn in zip(*questions.values(), strict=True):  # a prompt of each domain, so that what is there is balanced
        for domain, question in zip(questions, turn, strict=True):
            prompt = encoded(question, tokenizer).to(device)
            records[domain].append(decode_twice(model, prompt, args.new_tokens, args.strategy))
        measured = {domain: described(found) for domain, found in records.items()}
        result = {"machine": describe_machine(), "dtype": str(base.dtype), "strategy": args.strategy} | measured
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(len(records["maths"]), *(f"{name} {found['tokens_per_step']:.2f}" for name, found in measured.items()))
    if args.card:
        write_card(args.adapter, measured)


def decode_twice(model: PeftModel, prompt_1T: torch.LongTensor, new_tokens: int, strategy: str) -> Record:
    """One prompt, plainly and by `mtp=True`."""
    plain = decode(model, prompt_1T, new_tokens)
    return compare(plain, decode(model, prompt_1T, new_tokens, mtp=True, mtp_strategy=strategy))


def held_out_questions(data: Path, count: int) -> dict[str, list[str]]:
    """As many held-out prompts of each domain, taken at equal distances."""
    mbpp = [row["text"] for row in rows_of(data / "mbpp.jsonl") if row["task_id"] in MBPP_HELD_OUT]
    questions = {
        "maths": [row["question"] for row in rows_of(data / "gsm8k_test.jsonl")],
        "code": mbpp,
        "chat": [row["prompt"] for row in rows_of(data / "chat_test.jsonl")],
    }
    return {domain: texts[:: max(1, len(texts) // count)][:count] for domain, texts in questions.items()}


def encoded(question: str, tokenizer) -> torch.LongTensor:
    """`(1, T)`: the conversation that begins with a question."""
    conversation = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )["input_ids"]


def described(records: list[Record]) -> dict:
    """A domain's numbers, and what each answer took."""
    answers = [
        {"tokens": record.new_tokens, "passes": record.forward_passes_mtp, "identical": record.identical}
        for record in records
    ]
    return {**summarize(records), "answers": answers}


def write_card(adapter: Path, measured: dict[str, dict]) -> None:
    """Puts tokens per step into the adapter's config and model card."""
    config = GatedLoraConfig.from_pretrained(adapter)
    config.tokens_per_step = {DOMAINS[name]: round(found["tokens_per_step"], 2) for name, found in measured.items()}
    config.save_pretrained(adapter)
    write_model_card(config, adapter)


if __name__ == "__main__":
    main()
