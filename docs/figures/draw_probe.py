#!/usr/bin/env python
"""Draw what SmolLM2 knows of the tokens after the next one, from docs/results/probe.json.

python docs/figures/draw_probe.py    # writes docs/figures/probe.png
"""

from pathlib import Path

from hf_mtp.base.plotting import save_png
from hf_mtp.evaluation import load_probe
from hf_mtp.evaluation.ranks.figures import heatmap

HERE = Path(__file__).parent


def main(folder: Path) -> None:
    save_png(heatmap(load_probe(HERE.parent / "results" / "probe.json")), folder / "probe.png")


if __name__ == "__main__":
    main(HERE)
