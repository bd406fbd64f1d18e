"""How every benchmark ends: its report in a file, if one is wanted, and as the last line that it prints."""

import json
from pathlib import Path


def save(report: dict, output: Path | None) -> None:
    """Writes the report as JSON, if a file is wanted. Long benchmarks do so after each part."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def finish(report: dict, output: Path | None) -> None:
    """Writes the report and prints it as one line."""
    save(report, output)
    print(json.dumps(report))
