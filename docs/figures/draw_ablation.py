#!/usr/bin/env python
"""Draw what each change of the recipe brings, from docs/results/ablation.json.

python docs/figures/draw_ablation.py    # writes docs/figures/ablation.png
"""

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_mtp.base.plotting import COLOURS, GREY, save_png

HERE = Path(__file__).parent
DOMAINS = {"maths": "maths (GSM8K)", "chat": "chat", "python": "Python"}
REFERENCE, SEEDS, GATE = "reference", "other seeds", "gate"


def in_rows(runs: list[dict]) -> list[tuple[str, dict | None]]:
    """Label and run of each line of the picture. A group begins with a line that has no run."""
    rows, group = [], None
    for run in runs:
        if run["group"] in (SEEDS, GATE):  # drawn as a band; another base, whose figures do not compare
            continue
        if run["group"] != group and run["group"] != REFERENCE:
            rows.append((run["group"], None))
        group = run["group"]
        rows.append((run["name"], run))
    return rows


def draw_domain(axes: Axes, rows: list[tuple[str, dict | None]], runs: list[dict], domain: str) -> None:
    """One panel: a dot for each run, and a band for the differences between seeds."""
    by_chance = [run["tokens_per_pass"][domain] for run in runs if run["group"] in (REFERENCE, SEEDS)]
    axes.axvspan(min(by_chance), max(by_chance), color="#e9eef5", zorder=0)
    middle = next(run["tokens_per_pass"][domain] for run in runs if run["group"] == REFERENCE)
    axes.axvline(middle, color=GREY, linewidth=1, zorder=1)
    for height, (_, run) in enumerate(rows):
        if run is None:
            continue
        value = run["tokens_per_pass"][domain]
        colour = GREY if run["group"] == REFERENCE else COLOURS[0] if value >= middle else COLOURS[1]
        axes.plot([middle, value], [height, height], color=colour, linewidth=1.5, zorder=2)
        axes.plot(value, height, marker="o", markersize=5, color=colour, zorder=3)
    axes.set_title(DOMAINS[domain], loc="left", fontweight="bold")
    axes.set_xlabel("tokens per pass")
    axes.grid(axis="y", color="#f0f0f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def main(folder: Path) -> None:
    report = json.loads((HERE.parent / "results" / "ablation.json").read_text(encoding="utf-8"))
    rows = in_rows(report["runs"])
    figure = Figure(figsize=(9, 0.24 * len(rows) + 1.2), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(DOMAINS), sharey=True)
    for axes, domain in zip(panels, DOMAINS, strict=True):
        draw_domain(axes, rows, report["runs"], domain)
    panels[0].set_yticks(range(len(rows)), [label for label, _ in rows])
    for label, (_, run) in zip(panels[0].get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if run is None or run["group"] == REFERENCE else "normal")
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    save_png(figure, folder / "ablation.png")


if __name__ == "__main__":
    main(HERE)
