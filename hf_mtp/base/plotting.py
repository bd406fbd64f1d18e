"""Style of the project's plots. Needs matplotlib to draw, but no display. Knows nothing of what is plotted."""

import importlib.util
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from .files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito: safe for colour blindness
GREY = "#666666"
GAP = 0.07  # between two labels, as a fraction of the panel's height


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def style(axes: "Axes", title: str, subtitle: str) -> None:
    """Puts the title and a subtitle at the left, and keeps only horizontal grid lines."""
    axes.set_title(title, loc="left", fontweight="bold", pad=24)
    axes.annotate(subtitle, (0, 1), xytext=(0, 7), xycoords="axes fraction", textcoords="offset points", color=GREY)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_ends(axes: "Axes", ends: dict[str, tuple[float, float]], colours: list[str]) -> None:
    """Writes each line's name to the right of its last point, and moves names that would overlap.

    Args:
        axes (`matplotlib.axes.Axes`): The panel, with its final limits.
        ends (`dict[str, tuple[float, float]]`): The last point of each line, by name.
        colours (`list[str]`): Colour of each name.
    """
    to_panel = axes.transData + axes.transAxes.inverted()
    heights = spread([to_panel.transform(end)[1] for end in ends.values()], GAP)
    for name, height, colour in zip(ends, heights, colours, strict=True):
        axes.annotate(
            name,
            (1, height),
            xycoords="axes fraction",
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )


def spread(heights: list[float], gap: float) -> list[float]:
    """Moves labels apart as little as needed.

    Args:
        heights (`list[float]`): Wanted heights, from 0 at the bottom of the panel to 1 at its top.
        gap (`float`): Minimum distance of two labels.
    """
    upwards = sorted(range(len(heights)), key=heights.__getitem__)
    moved, lowest = {}, 0.0
    for index in upwards:
        moved[index] = max(heights[index], lowest)
        lowest = moved[index] + gap
    highest = 1.0
    for index in reversed(upwards):
        moved[index] = min(moved[index], highest)
        highest = moved[index] - gap
    return [moved[index] for index in range(len(heights))]


def save_png(figure: "Figure", path: Path) -> None:
    """Writes a figure atomically."""
    picture = BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, [picture.getvalue()])


def save_figure(figure: "Figure", folder: Path, name: str) -> list[Path]:
    """Writes a figure as PNG and SVG.

    Args:
        figure (`matplotlib.figure.Figure`): The figure.
        folder (`Path`): An existing folder.
        name (`str`): Name of the files, without a suffix.

    Returns:
        `list[Path]`: The files.
    """
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path)
    return paths
