"""Draws ranks of future tokens: a heatmap by source and position, and how many tokens are among the likeliest n."""

from pathlib import Path
from typing import TYPE_CHECKING

from ...base.plotting import GREY, save_figure, style
from ..measures import ALL
from .results import TOPS, ProbeResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEATMAP, HISTOGRAM = "heatmap", "histogram"
DARK_TO_BRIGHT = "viridis_r"  # rank 1 is bright


def draw_ranks(results: ProbeResults, folder: Path) -> list[Path]:
    """Draws the heatmap and the cumulative histogram, each as PNG and SVG. Needs matplotlib.

    Args:
        results ([`ProbeResults`]): The results.
        folder (`Path`): An existing folder.

    Returns:
        `list[Path]`: The files.
    """
    return [
        *save_figure(heatmap(results), folder, HEATMAP),
        *save_figure(histogram(results), folder, HISTOGRAM),
    ]


def heatmap(results: ProbeResults) -> "Figure":
    """The median rank of the true token, by source and position.

    Args:
        results ([`ProbeResults`]): The results.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    positions = [position for position in next(iter(results.summaries.values())) if position != ALL]
    medians = [[rows[position].median for position in positions] for rows in results.summaries.values()]
    figure = Figure(figsize=(3 + 0.8 * len(positions), 1.6 + 0.4 * len(medians)), dpi=125, layout="constrained")
    axes = figure.subplots()
    colours = LogNorm(1, max(10, *map(max, medians)))
    image = axes.imshow(medians, cmap=DARK_TO_BRIGHT, norm=colours, aspect="auto")
    figure.colorbar(image, ax=axes, label="median rank")
    for row, values in enumerate(medians):
        for column, value in enumerate(values):
            shade = "white" if colours(value) > 0.5 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=shade, fontsize=8)
    axes.set_xticks(range(len(positions)), positions)
    axes.set_yticks(range(len(medians)), list(results.summaries))
    axes.set_xlabel("position (1 is the token after the next one)")
    axes.set_title("Median rank of the true future token", loc="left", fontweight="bold")
    return figure


def histogram(results: ProbeResults) -> "Figure":
    """The share of true tokens up to each rank, by source, all positions together.

    Args:
        results ([`ProbeResults`]): The results.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), dpi=125, layout="constrained")
    _draw_shares(figure.subplots(), results)
    return figure


def _draw_shares(axes: "Axes", results: ProbeResults) -> None:
    from matplotlib import colormaps

    style(axes, "True future tokens among the n most likely", "share of tokens, all positions; dashed: the base alone")
    for top in TOPS:
        axes.axvline(top, color=GREY, linewidth=0.8, linestyle=":")
    for number, source in enumerate(results.summaries):
        line = "--" if source in results.placeholders else "-"
        axes.ecdf(results.ranks(source), label=source, linestyle=line, color=colormaps["tab10"](number % 10))
    axes.set_xscale("log")
    axes.set_xlim(left=0.9)
    axes.set_ylim(0, 1.02)
    axes.set_xticks(TOPS, [str(top) for top in TOPS])
    axes.set_xlabel("n")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
