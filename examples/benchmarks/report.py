"""How every benchmark ends: its report in a file, if one is wanted, and as the last line that it prints."""

import json
from pathlib import Path


def finish(report: dict, output: Path | None) -> None:
    """Writes the report as JSON and prints it as one line."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
