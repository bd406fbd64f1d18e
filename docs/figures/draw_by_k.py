#!/usr/bin/env python
"""Draw the paper's table on the real model, from docs/results/by_k.json.

python docs/figures/draw_by_k.py    # writes docs/figures/by_k.png
"""

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_mtp.base.plotting import COLOURS, GREY, save_png

HERE = Path(__file__).parent
STRATEGIES = ("linear", "quadratic", "auto")
K = (1, 2, 4, 8)
NUMBERS = {"tokens_per_pass": "tokens per pass", "speedup": "speedup over plain"}


def draw_panel(axes: Axes, ways: dict[str, dict], number: str) -> None:
    """One line for each strategy."""
    axes.axhline(1, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    for strategy, colour in zip(STRATEGIES, COLOURS, strict=False):
        values = [ways[f"{strategy}, k={k}"][number] for k in K]
        axes.plot(range(len(K)), values, color=colour, marker="o", markersize=4, linewidth=2, label=strategy)
    axes.set_xticks(range(len(K)), [str(k) for k in K])
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def main(folder: Path, results: Path = HERE.parent / "results") -> None:
    kinds = json.loads((results / "by_k.json").read_text(encoding="utf-8"))["domains"]
    figure = Figure(figsize=(2.1 * len(kinds), 4.6), dpi=130, layout="constrained")
    panels = figure.subplots(len(NUMBERS), len(kinds), sharex=True, sharey="row", squeeze=False)
    for (number, label), row in zip(NUMBERS.items(), panels, strict=True):
        for (kind, ways), axes in zip(kinds.items(), row, strict=True):
            draw_panel(axes, ways, number)
            axes.set_title(kind if number == "tokens_per_pass" else "", loc="left", fontweight="bold")
        row[0].set_ylabel(label)
    for axes in panels[-1]:
        axes.set_xlabel("k")
    panels[0][-1].legend(frameon=False)
    save_png(figure, folder / "by_k.png")


if __name__ == "__main__":
    main(HERE)
