#!/usr/bin/env python
"""Write the prompts to train on: maths, code and chat in equal numbers, each with its source and licence.

    python examples/smollm2/prompts.py DATA prompts.jsonl --base smollm2 --per-domain 4000

DATA is a folder with the files that README.md beside this script lists. The chat prompts, and a part of the code
prompts, are written by the model itself. A prompt that is close to a held-out text is left out. No answers are taken
from anywhere: `train.py` lets the model answer.
"""

import argparse
import ast
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from held_out import MBPP_HELD_OUT, HeldOut, held_out_texts, rows_of, words_of
from own_prompts import write_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DOMAINS = ("maths", "code", "chat")
LICENCES = {
    "gsm8k": "MIT",
    "mbpp": "CC-BY-4.0",
    "self-instruct": "Apache-2.0",
    "cpython": "PSF-2.0",
    "smollm2": "Apache-2.0",  # the model's own words
}
HUMAN_SEEDS = ("self-instruct/seed_tasks", "self-instruct/user_oriented")  # other rows were written by GPT-4
LONGEST = 1200  # characters
CODE_STARTS = ("Write a function to", "Write a python function to", "Write a Python function to")
CHAT_STARTS = (
    *[""] * 8,  # all left to the model
    *("What", "How", "Why", "Can you", "Explain", "Describe", "Compare", "List", "Give me", "Suggest", "Summarize"),
    *("Write a short", "Create a", "Tell me", "Rewrite the following", "Imagine you are", "You are a", "As a"),
    *("Write a C++ program", "In JavaScript,", "How would you implement", "Design a", "Write a shell script"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the sources")
    parser.add_argument("output", type=Path, help="file for the prompts, JSON Lines")
    parser.add_argument("--base", required=True, help="the model's folder")
    parser.add_argument("--per-domain", type=int, default=4000, help="prompts of each domain (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="prompts that the model writes at a time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16).to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    prompts = make_prompts(args.data, model, tokenizer, args.per_domain, args.batch_size, args.seed)
    save_rows(prompts, args.output)


def make_prompts(
    data: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    per_domain: int,
    batch_size: int,
    seed: int,
) -> list[dict]:
    """Rows with `prompt`, `domain`, `source` and `licence`, as many of each domain.

    What people wrote comes first; the model writes the rest of code (half of it at least) and of chat.
    """
    held_out = HeldOut(held_out_texts(data))
    chance = random.Random(seed)
    chosen = {}
    for domain, rows in sources(data).items():
        rows = usable(rows, held_out)
        chance.shuffle(rows)
        rows.sort(key=lambda row: row["source"] == "cpython")  # there are so many that they would hide MBPP
        chosen[domain] = rows[: per_domain if domain == "maths" else per_domain // 2]
    for domain, starts in {"code": CODE_STARTS, "chat": CHAT_STARTS}.items():
        missing = per_domain - len(chosen[domain])
        wanted = missing + missing // 4  # some are doubles, or too close to held-out texts
        written = write_prompts(model, tokenizer, [chance.choice(starts) for _ in range(wanted)], batch_size, seed)
        known = [row["prompt"][0]["content"] for row in chosen[domain]]
        chosen[domain] += usable((row_of(text, domain, "smollm2") for text in written), held_out, known)[:missing]
    return [row for domain in DOMAINS for row in chosen[domain]]


def sources(data: Path) -> dict[str, list[dict]]:
    """What people wrote, by domain."""
    return {
        "maths": [row_of(row["question"], "maths", "gsm8k") for row in rows_of(data / "gsm8k_train.jsonl")],
        "code": [*mbpp(data / "mbpp.jsonl"), *docstring_prompts(data / "python_stdlib.jsonl")],
        "chat": [*seeds(data / "chat_train.jsonl")],
    }


def row_of(text: str, domain: str, source: str) -> dict:
    """A conversation that begins with this text, and where that is from."""
    prompt = [{"role": "user", "content": text.strip()}]
    return {"prompt": prompt, "domain": domain, "source": source, "licence": LICENCES[source]}


def mbpp(path: Path) -> Iterator[dict]:
    """MBPP's tasks that are not held out."""
    for row in rows_of(path):
        if row["task_id"] not in MBPP_HELD_OUT:
            yield row_of(row["text"], "code", "mbpp")


def seeds(path: Path) -> Iterator[dict]:
    """Self-instruct's instructions by people. The file's other rows are a GPT's, and are left out."""
    for row in rows_of(path):
        if row["source"] in HUMAN_SEEDS:
            yield row_of(row["prompt"], "chat", "self-instruct")


def docstring_prompts(path: Path) -> Iterator[dict]:
    """A request for every documented function of Python modules."""
    for module in rows_of(path):
        for name, summary in documented_functions(module["text"]):
            yield row_of(f"Write a Python function `{name}`: {summary}", "code", "cpython")


def documented_functions(source: str) -> Iterator[tuple[str, str]]:
    """`(signature, first paragraph of the docstring)` of public functions that say what they do."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if 5 <= len(summary.split()) <= 60:
            arguments = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
            yield f"{node.name}({', '.join(arguments)})", summary


def usable(rows: Iterable[dict], held_out: HeldOut, known: Iterable[str] = ()) -> list[dict]:
    """The rows without doubles, held-out texts, and prompts that are too short or too long."""
    seen = {words_of(text) for text in known}
    kept = []
    for row in rows:
        text = row["prompt"][0]["content"]
        words = words_of(text)
        if len(words) >= 3 and len(text) <= LONGEST and words not in seen and text not in held_out:
            seen.add(words)
            kept.append(row)
    return kept


def save_rows(rows: list[dict], path: Path) -> None:
    """Writes rows as JSON Lines, all or nothing."""
    draft = path.with_name(f".{path.name}.part")
    draft.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    main()
