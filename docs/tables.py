"""Reads committed results and writes Markdown tables. Knows nothing of what was measured."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def machine(report: dict) -> str:
    """One line: the machine and the versions that the numbers were measured with."""
    about = report["machine"]
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "transformers", "peft", "trl"))
    return f"{about['processor']}, {about['threads']} threads, Python {about['python']}, {versions}"
