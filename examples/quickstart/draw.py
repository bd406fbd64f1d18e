"""The quickstart's picture: tokens per step against k, one line per domain."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, never a window
import matplotlib.pyplot as plt

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito: apart for every kind of sight
GREY = "#666666"


def draw_tokens_per_step(curves: dict[str, dict[int, float]], prompts: int, path: Path) -> None:
    """Draws `curves`, tokens per step by k for each domain, into a PNG at `path`.

    Args:
        curves (`dict[str, dict[int, float]]`): Per domain, k to tokens per step.
        prompts (`int`): How many prompts per domain they are measured on.
        path (`Path`): Where the picture goes.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=160, layout="constrained")
    largest_k = max(k for curve in curves.values() for k in curve)
    for curve, colour in zip(curves.values(), COLOURS, strict=False):
        axes.plot(curve.keys(), curve.values(), color=colour, marker="o", markersize=5, linewidth=2, clip_on=False)
    for (domain, value), height, colour in zip(last_points(curves), spread(curves), COLOURS, strict=False):
        axes.annotate(
            f"{domain}  {value:.2f}",
            (largest_k, height),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )
    axes.axhline(1, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("plain decoding", (largest_k, 1), xytext=(0, 4), textcoords="offset points", ha="right", color=GREY)

    plural = "" if prompts == 1 else "s"
    axes.set_title("Tokens per forward pass", loc="left", fontweight="bold", pad=24)
    axes.text(0, 1.03, f"greedy, {prompts} held-out prompt{plural} per domain", transform=axes.transAxes, color=GREY)
    axes.set_xlabel("k, the number of drafts in each forward pass (mtp_k)")
    axes.set_ylabel("tokens per step")
    axes.set_xticks(range(1, largest_k + 1))
    axes.set_ylim(bottom=0.9)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def last_points(curves: dict[str, dict[int, float]]) -> list[tuple[str, float]]:
    """Each domain with its value at the largest k."""
    return [(domain, curve[max(curve)]) for domain, curve in curves.items()]


def spread(curves: dict[str, dict[int, float]]) -> list[float]:
    """Heights of the domains' labels: where their lines end, moved apart where they would overlap."""
    ends = [value for _, value in last_points(curves)]
    gap = 0.07 * (max(value for curve in curves.values() for value in curve.values()) - 0.9)
    heights, lowest = {}, 0.9  # the bottom of the picture
    for index in sorted(range(len(ends)), key=ends.__getitem__):
        heights[index] = max(ends[index], lowest)
        lowest = heights[index] + gap
    return [heights[index] for index in range(len(ends))]
