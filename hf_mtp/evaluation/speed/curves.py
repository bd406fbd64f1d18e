"""Draws the results of an evaluation against k: tokens per pass, and speed by the wall clock."""

from pathlib import Path
from typing import TYPE_CHECKING

from ...base.plotting import GREY, label_ends, save_figure, style
from .results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "curves"
PANELS = {
    "tokens_per_pass": ("Tokens per pass", "new tokens per forward pass of the base, pooled"),
    "speedup": ("Speed", "plain decoding's seconds divided by ours, median over prompts"),
}


def draw_curves(results: Results, folder: Path) -> list[Path]:
    """Draws one column of panels for each strategy, with a line for each domain, as PNG and SVG.

    Args:
        results ([`Results`]): The results. Strategies with one k have a point for each domain.
        folder (`Path`): An existing folder.

    Returns:
        `list[Path]`: The files; none if nothing was measured.
    """
    strategies = {
        strategy: {
            method["k"]: method["name"] for method in results.settings.methods if method["strategy"] == strategy
        }
        for strategy in dict.fromkeys(
            method["strategy"] for method in results.settings.methods if method["k"] is not None
        )
    }
    measured = {method for methods in results.domains.values() for method in methods}
    strategies = {name: by_k for name, by_k in strategies.items() if measured.issuperset(by_k.values())}
    if not strategies:
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(strategies) + 1, 8), dpi=125, layout="constrained")
    grid = figure.subplots(len(PANELS), len(strategies), sharex=True, sharey="row", squeeze=False)
    for row, (measure, (title, subtitle)) in zip(grid, PANELS.items(), strict=True):
        for axes, (strategy, by_k) in zip(row, strategies.items(), strict=True):
            _draw_panel(axes, results, measure, by_k, (f"{title}, {strategy}", subtitle))
    for axes in grid[-1]:
        axes.set_xlabel("k, masks per block")
    return save_figure(figure, folder, NAME)


def _draw_panel(axes: "Axes", results: Results, measure: str, by_k: dict[int, str], titles: tuple[str, str]) -> None:
    """One measure of one strategy against k."""
    from matplotlib import colormaps
    from matplotlib.ticker import FixedLocator

    style(axes, *titles)
    axes.axhline(1, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    colours = [colormaps["tab10"](index % 10) for index in range(len(results.domains))]
    ends = {}
    for (domain, methods), colour in zip(results.domains.items(), colours, strict=True):
        values = {k: getattr(methods[name], measure) for k, name in sorted(by_k.items())}
        axes.plot(values.keys(), values.values(), "o-", color=colour, markersize=4, linewidth=1.8)
        ends[domain] = [*values.items()][-1]
    axes.xaxis.set_major_locator(FixedLocator(sorted(by_k)))
    axes.margins(x=0.05)
    axes.set_ylim(bottom=0)
    axes.autoscale_view()
    label_ends(axes, ends, colours)
