"""The style of the project's line plots. Needs matplotlib, and makes figures that no window ever shows."""

from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...base.files import write_whole

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito: apart for every kind of sight
GREY = "#666666"
GAP = 0.07  # between two labels, in heights of the panel


def style(axes: Axes, title: str, subtitle: str) -> None:
    """Title at the left, its explanation under it, horizontal lines only.

    Args:
        axes (`matplotlib.axes.Axes`): One panel.
        title (`str`): What it shows.
        subtitle (`str`): How that came about, or its unit.
    """
    axes.set_title(title, loc="left", fontweight="bold", pad=24)
    axes.annotate(subtitle, (0, 1), xytext=(0, 7), xycoords="axes fraction", textcoords="offset points", color=GREY)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_ends(axes: Axes, ends: dict[str, tuple[float, float]], colours: list[str], gap: float = GAP) -> None:
    """Writes each line's name to the right of its last point, moved where two would overlap.

    Args:
        axes (`matplotlib.axes.Axes`): The panel, when its limits are final.
        ends (`dict[str, tuple[float, float]]`): Per name, the last point.
        colours (`list[str]`): Of the names.
        gap (`float`, *optional*, defaults to `0.07`): Between two labels, in heights of the panel.
    """
    to_panel = axes.transData + axes.transAxes.inverted()
    heights = spread([to_panel.transform(end)[1] for end in ends.values()], gap)
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
    """Heights of labels, each where it belongs or as far from there as its neighbours need.

    Args:
        heights (`list[float]`): Where they belong, 0 at the bottom of the panel and 1 at its top.
        gap (`float`): Between two at least.
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


def save_png(figure: Figure, path: Path) -> None:
    """Writes a picture that is there whole or not at all.

    Args:
        figure (`matplotlib.figure.Figure`): The picture.
        path (`Path`): Where it goes.
    """
    picture = BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, [picture.getvalue()])
