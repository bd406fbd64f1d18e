#!/usr/bin/env python
"""How long the commands take that check and measure a model, from their start to their end.

    python examples/benchmarks/measure_commands.py ADAPTER --output docs/results/commands.json

ADAPTER is the folder of an adapter that `make quickstart` trained: its base is a small one, which ships with this
repository. Each command runs once, in a process of its own. Prints a table; the last line is one JSON document.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import finish

from hf_mtp.base.machine import describe_machine

HELP_ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder of the adapter")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "hf-mtp verify": ["verify", args.adapter, "--dtype", "float32"],
            "hf-mtp evaluate --suite quick": ["evaluate", args.adapter, "--suite", "quick", "--output", f"{folder}/1"],
            "hf-mtp probe": ["probe", args.adapter, "--output", f"{folder}/2"],
        }
        seconds = {"hf-mtp --help": min(seconds_of(["--help"]) for _ in range(HELP_ROUNDS))}
        for name, arguments in commands.items():
            seconds[name] = seconds_of(arguments)
    for name, value in seconds.items():
        print(f"{name}: {value:.1f} s")
    seconds = {name: round(value, 2) for name, value in seconds.items()}
    finish({"machine": describe_machine(), "seconds": seconds}, args.output)


def seconds_of(arguments: list[str]) -> float:
    """Seconds of one command."""
    start = time.perf_counter()
    subprocess.run([Path(sys.executable).with_name("hf-mtp"), *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
