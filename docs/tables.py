"""Reads committed results and writes Markdown tables. Knows nothing of what was measured."""

import json
from pathlib import Path

from hf_mtp.base.machine import threads_in_words
from hf_mtp.evaluation.markdown import markdown_table

RESULTS = Path(__file__).parent / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> str:
    return markdown_table(head, rows) + "\n"


def value(path: str, form: str) -> str:
    """One number of a committed result, or the ratio of two.

    Args:
        path (`str`): Name of the file and keys, separated by slashes: `decoding/batches/4/auto/speedup`. In a list, a
            key is an index, or `name=NAME` for the first row whose field has this value. `PATH over PATH` is a ratio.
        form (`str`): How to write it, as for `str.format`.
    """
    numbers = [_number(*part.split("/")) for part in path.split(" over ")]
    return form.format(numbers[0] / numbers[1] if len(numbers) == 2 else numbers[0])


def _number(name: str, *keys: str) -> float:
    found = load(name)
    for key in keys:
        if isinstance(found, dict):
            found = found[key]
        elif key.isdecimal():
            found = found[int(key)]
        else:
            field, _, wanted = key.partition("=")
            found = next(row for row in found if row[field] == wanted)
    return found


def machine(report: dict) -> str:
    """One line: the machine and the versions that the numbers were measured with."""
    about = report["machine"]
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "transformers", "peft", "trl"))
    return f"{about['processor']}, {threads_in_words(about)}, Python {about['python']}, {versions}"


def aim(text: str, is_met: bool) -> str:
    """A target, and whether a result meets it."""
    return f"{text}: **{'met' if is_met else 'missed'}**"
