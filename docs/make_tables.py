#!/usr/bin/env python
"""Write the tables of README.md and docs/*.md from the committed results.

    python docs/make_tables.py            # writes them
    python docs/make_tables.py --check    # exits with 1 if a table is out of date

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. NAME is the function that makes it, in one of the
modules *_tables.py. A number of a sentence stands between `<!-- value: PATH as FORM -->` and `<!-- end -->`. PATH and
FORM are arguments of `value` in tables.py.
"""

import re
import sys
from pathlib import Path

import evaluation_tables
import peer_tables
import reference_tables
import scenario_tables
import serving_tables
import smollm2_tables
import support_tables
import training_tables
import vllm_tables
from tables import value

DOCS = Path(__file__).parent
PAGES = (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")))
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
VALUE = re.compile(r"(<!-- value: (.+?) as (.+?) -->)[^<]*(<!-- end -->)")
MODULES = (
    reference_tables,
    training_tables,
    support_tables,
    smollm2_tables,
    evaluation_tables,
    peer_tables,
    scenario_tables,
    serving_tables,
    vllm_tables,
)


def fill(name: str) -> str:
    """The table called `name`, or a note if its results are missing."""
    try:
        return {key: made for module in MODULES for key, made in vars(module).items()}[name]()
    except FileNotFoundError:
        return "Not measured yet.\n"


def filled(text: str) -> str:
    """A page with all its tables, and all numbers of its sentences, as the results have them."""
    text = BLOCK.sub(lambda match: match[1] + fill(match[2]) + match[3], text)
    return VALUE.sub(lambda match: match[1] + value(match[2], match[3]) + match[4], text)


def main() -> None:
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            stale.append(page.name)
            if "--check" not in sys.argv[1:]:
                page.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        sys.exit(f"Tables of {', '.join(stale)} are out of date: run docs/make_tables.py")


if __name__ == "__main__":
    main()
