"""The text that the quickstart's base model is trained and watched on."""

import argparse
import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path

from make_data import (
    Example,
    from_json,
    functions_of,
    load_gsm8k,
    python_files,
    split_standard_library,
    unique,
    without,
)

CODE_PACKAGES = (
    "numpy scipy pandas sympy networkx torch transformers peft trl accelerate datasets huggingface_hub".split()
)
CONTEXT = 512  # tokens of one packed training window

Corpus = dict[str, list[Example]]


def load_corpora(args: argparse.Namespace) -> tuple[Corpus, Corpus, Corpus]:
    """(training, watched, test) examples by domain.

    Test examples are the bundled test files; watched ones are other held-out examples, which choose the
    checkpoint. No held-out answer is among the training answers.
    """
    domains = ("maths", "python")
    test = {domain: from_json(args.data / f"{domain}_test.jsonl") for domain in domains}
    python_train, python_held_out = split_standard_library()
    for package in args.code_packages:
        python_train += package_functions(package)
    held_out = {"maths": load_gsm8k("test", args.gsm8k_test), "python": python_held_out}
    watched = {domain: sorted(set(held_out[domain]) - set(test[domain])) for domain in domains}
    train = {"maths": load_gsm8k("train", args.gsm8k_train), "python": unique(python_train)}
    train = {domain: without(train[domain], test[domain] + watched[domain]) for domain in domains}
    return train, watched, test


def package_functions(package: str) -> list[Example]:
    """The short documented functions of an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"--code-packages names {package!r}, which is not installed: install it or leave it out")
    files = python_files(Path(spec.origin).parent)
    return [function for path in files for function in functions_of(path.read_text("utf-8", "replace"))]


def packed_windows(sequences: list[list[int]], seed: int) -> Iterator[list[int]]:
    """An endless stream of windows of `CONTEXT` tokens, cut from the reshuffled and joined `sequences`."""
    rng, buffer = random.Random(seed), []
    while True:
        for ids in rng.sample(sequences, len(sequences)):
            buffer += ids
            while len(buffer) >= CONTEXT:
                yield buffer[:CONTEXT]
                buffer = buffer[CONTEXT:]
