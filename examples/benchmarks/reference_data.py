"""The text that the reference benchmarks train and measure on, as TRL takes it.

Three domains from one folder of JSON Lines: maths (GSM8K), chat (instructions) and python (the standard library). See
docs/benchmarks.md for the files and where they come from. Train files are trained on, test files measured on.
"""

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

DOMAINS = ("maths", "chat", "python")
# Share of each domain among the training sequences: most of what is hardest to foresee.
MIX = {"maths": 0.13, "chat": 0.13, "python": 0.74}
CHARACTERS_PER_PIECE = 900  # about 300 tokens, as long as a maths example


def train_dataset(folder: Path, tokenizer: PreTrainedTokenizerBase, sequences: int, seed: int = 0) -> Dataset:
    """`sequences` shuffled training examples, mixed as [`MIX`] says; domains that run out are repeated."""
    parts = []
    for domain in DOMAINS:
        rows = list(_examples(folder, domain, "train", tokenizer))
        random.Random(seed).shuffle(rows)
        wanted = round(sequences * MIX[domain])
        parts.append(Dataset.from_list((rows * -(-wanted // len(rows)))[:wanted]))
    return concatenate_datasets(parts).shuffle(seed=seed)


def test_dataset(folder: Path, tokenizer: PreTrainedTokenizerBase, domain: str, sequences: int) -> Dataset:
    """The first `sequences` held-out examples of a domain."""
    return Dataset.from_list(list(islice(_examples(folder, domain, "test", tokenizer), sequences)))


def _examples(folder: Path, domain: str, split: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict]:
    """Prompt and completion: a chat's as the template renders it; a module's source follows the bare start token."""
    if domain == "python":
        name = "python_stdlib.jsonl" if split == "train" else "python_stdlib_test.jsonl"
        for row in _rows(folder / name):
            if not row["path"].startswith("encodings/"):  # tables of characters
                for piece in _pieces(row["text"]):
                    yield {"prompt": tokenizer.bos_token, "completion": piece}
        return
    file, question, answer = {
        "maths": (f"gsm8k_{split}.jsonl", "question", "answer"),
        "chat": (f"chat_{split}.jsonl", "prompt", "response"),
    }[domain]
    for row in _rows(folder / file):
        message = [{"role": "user", "content": row[question]}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        yield {"prompt": prompt, "completion": row[answer]}


def _pieces(source: str) -> Iterator[str]:
    """A module's source in pieces of whole lines."""
    piece = ""
    for line in source.splitlines(keepends=True):
        piece += line
        if len(piece) >= CHARACTERS_PER_PIECE:
            yield piece
            piece = ""
    if piece.strip():
        yield piece


def _rows(path: Path) -> Iterator[dict]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: --data names a folder with the files that docs/benchmarks.md lists."
        )
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)
