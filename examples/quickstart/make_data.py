#!/usr/bin/env python
"""Make the bundled text of the quickstart: two small domains, maths and Python, as prompts with their answers.

    python make_data.py                                                    # GSM8K from the Hugging Face Hub
    python make_data.py --gsm8k-train train.jsonl --gsm8k-test test.jsonl  # GSM8K from local JSON Lines

- *maths*: GSM8K questions and worked answers, without the `<<48/2=24>>` calculator marks.
- *python*: short documented functions of the running interpreter's standard library. The prompt holds the
  signature and the docstring's first line, the answer is the whole function.

Each domain gets a train and a test file in TRL's conversational prompt-completion form. Test rows are held out:
GSM8K's own test split, and Python modules of which no function is in the train file. The files depend on the
Python version that runs this script; `data/README.md` names the one that made the files kept here.
"""

import argparse
import ast
import hashlib
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PYTHON_TASK = "Write this Python function.\n\n"
SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "encodings", "turtledemo", "__pycache__"}
TEST_ROWS = 40
MAX_TEST_CHARS = {"maths": 300, "python": 300}  # an answer of about 128 tokens at most
TRAIN_BYTES = {"maths": 1_450_000, "python": 950_000}


class Example(NamedTuple):
    """One question with its answer, both plain text."""

    prompt: str
    answer: str

    def as_row(self) -> dict[str, list[dict[str, str]]]:
        """The example in TRL's conversational prompt-completion form."""
        return {
            "prompt": [{"role": "user", "content": self.prompt}],
            "completion": [{"role": "assistant", "content": self.answer}],
        }


# --- maths -----------------------------------------------------------------------------------------------------


def load_gsm8k(split: str, path: Path | None = None) -> list[Example]:
    """GSM8K's `split`, from the JSON Lines file at `path` or else from the Hugging Face Hub."""
    if path is not None:
        rows = read_json_lines(path)
    else:
        from datasets import load_dataset

        rows = load_dataset("openai/gsm8k", "main", split=split)
    return [Example(row["question"].strip(), re.sub(r"<<.*?>>", "", row["answer"]).strip()) for row in rows]


# --- python ----------------------------------------------------------------------------------------------------


def python_files(root: Path) -> Iterator[Path]:
    """The Python files below `root`, in a fixed order, without tests and without other packages."""
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts) and not path.name.startswith("test_"):
            yield path


def functions_of(source: str, max_body_lines: int = 12, max_chars: int = 600) -> Iterator[Example]:
    """The short documented functions of one module's `source`, each as an [`Example`].

    `ast.unparse` lays every function out in one style and leaves comments out, which keeps the task regular
    enough for a small model. Decorated functions and stubs are left out.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.decorator_list or not ast.get_docstring(node):
            continue
        summary = ast.get_docstring(node).strip().split("\n")[0].strip()
        body = node.body[1:]
        if not 12 <= len(summary) <= 90 or '"' in summary or "\\" in summary or not body or is_stub(body):
            continue
        node.body = [ast.Expr(ast.Constant(summary))]
        head = ast.unparse(node)
        node.body = node.body + body
        answer = ast.unparse(node)
        lines = answer.splitlines()
        is_short = len(answer) <= max_chars and len(lines) - len(head.splitlines()) <= max_body_lines
        if is_short and answer.isascii() and max(map(len, lines)) <= 110:
            yield Example(PYTHON_TASK + head, answer)


def is_stub(body: list[ast.stmt]) -> bool:
    """Whether a function does nothing: `pass`, `...`, or nothing but raising an error."""
    first = body[0].value if isinstance(body[0], ast.Expr) else body[0]
    return isinstance(first, ast.Pass | ast.Raise | ast.Constant)


def standard_library() -> dict[str, list[Example]]:
    """The running interpreter's standard library: module path to the short documented functions in it.

    Modules with a copyright notice of their own are left out: the others have Python's licence and no second one.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {path.relative_to(root).as_posix(): path.read_text("utf-8", "replace") for path in python_files(root)}
    return {
        module: list(functions_of(source))
        for module, source in sources.items()
        if not re.search(r"copyright|licen[cs]e", source, re.IGNORECASE)
    }


def is_held_out(module: str, percent: int = 8) -> bool:
    """Whether a module belongs to the held-out part, decided by a hash of its path."""
    return int(hashlib.sha1(module.encode()).hexdigest(), 16) % 100 < percent


def split_standard_library() -> tuple[list[Example], list[Example]]:
    """(train, held-out) functions of the standard library, from disjoint modules and with no answer in both."""
    train, held_out = [], []
    for module, functions in standard_library().items():
        (held_out if is_held_out(module) else train).extend(functions)
    held_out = unique(held_out)
    return without(unique(train), held_out), held_out


def unique(examples: Iterable[Example]) -> list[Example]:
    """`examples` without those whose answer came before."""
    return list({example.answer: example for example in examples}.values())


def without(examples: Iterable[Example], other: Iterable[Example]) -> list[Example]:
    """`examples` without those whose body, the docstring aside, is also the body of one in `other`."""
    bodies = {body_of(example) for example in other}
    return [example for example in examples if body_of(example) not in bodies]


def body_of(example: Example) -> str:
    """What a Python answer adds to its prompt."""
    return example.answer.removeprefix(example.prompt.removeprefix(PYTHON_TASK))


# --- files -----------------------------------------------------------------------------------------------------


def test_rows(examples: list[Example], domain: str) -> list[Example]:
    """The held-out rows that make the test file: short prompts, and answers of two lines or more that are not long."""
    fitting = [
        example
        for example in examples
        if len(example.prompt) <= 300 and 60 <= len(example.answer) <= MAX_TEST_CHARS[domain]
        if domain == "maths" or body_of(example).count("\n") >= 2
    ]
    return random.Random(0).sample(fitting, TEST_ROWS)


def train_rows(examples: list[Example], domain: str) -> list[Example]:
    """A random part of `examples` that fits into the domain's share of bytes."""
    shuffled, size = random.Random(0).sample(examples, len(examples)), 0
    for count, example in enumerate(shuffled):
        size += len(to_json(example))
        if size > TRAIN_BYTES[domain]:
            return shuffled[:count]
    return shuffled


def to_json(example: Example) -> str:
    """One line of a JSON Lines file."""
    return json.dumps(example.as_row(), ensure_ascii=False) + "\n"


def read_json_lines(path: Path) -> list[dict]:
    """The rows of a JSON Lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def from_json(path: Path) -> list[Example]:
    """The examples of a file that this script wrote."""
    rows = read_json_lines(path)
    return [Example(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows]


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k-train", type=Path, help="GSM8K's train split as JSON Lines (default: from the Hub)")
    parser.add_argument("--gsm8k-test", type=Path, help="GSM8K's test split as JSON Lines (default: from the Hub)")
    parser.add_argument("--output", type=Path, default=HERE / "data", help="folder to write to")
    args = parser.parse_args()

    python_train, python_test = split_standard_library()
    files = {
        "maths_train": train_rows(load_gsm8k("train", args.gsm8k_train), "maths"),
        "maths_test": test_rows(load_gsm8k("test", args.gsm8k_test), "maths"),
        "python_train": train_rows(python_train, "python"),
        "python_test": test_rows(python_test, "python"),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for name, examples in files.items():
        path = args.output / f"{name}.jsonl"
        path.write_text("".join(map(to_json, examples)), encoding="utf-8")
        print(f"{path.name}: {len(examples)} rows, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
