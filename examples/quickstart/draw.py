"""The quickstart's picture: tokens per step against k, one line per domain."""

from pathlib import Path

from matplotlib.figure import Figure

from hf_mtp.evaluation.plotting import COLOURS, GREY, label_ends, save_png, style


def draw_tokens_per_step(curves: dict[str, dict[int, float]], prompts: int, path: Path) -> None:
    """Draws `curves`, tokens per step by k for each domain, into a PNG at `path`.

    Args:
        curves (`dict[str, dict[int, float]]`): Per domain, k to tokens per step.
        prompts (`int`): How many prompts per domain they are measured on.
        path (`Path`): Where the picture goes.
    """
    figure = Figure(figsize=(6.4, 4.2), dpi=160, layout="constrained")
    axes = figure.subplots()
    largest_k = max(k for curve in curves.values() for k in curve)
    colours = COLOURS[: len(curves)]
    for curve, colour in zip(curves.values(), colours, strict=True):
        axes.plot(curve.keys(), curve.values(), color=colour, marker="o", markersize=5, linewidth=2, clip_on=False)
    axes.axhline(1, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("plain decoding", (largest_k, 1), xytext=(0, 4), textcoords="offset points", ha="right", color=GREY)

    plural = "" if prompts == 1 else "s"
    style(axes, "Tokens per forward pass", f"greedy, {prompts} held-out prompt{plural} per domain")
    axes.set_xlabel("k, the number of drafts in each forward pass (mtp_k)")
    axes.set_ylabel("tokens per step")
    axes.set_xticks(range(1, largest_k + 1))
    axes.set_ylim(bottom=0.9)
    label_ends(axes, last_points(curves), colours)
    save_png(figure, path)


def last_points(curves: dict[str, dict[int, float]]) -> dict[str, tuple[int, float]]:
    """Each domain, with its value in words, and where its line ends."""
    return {f"{domain}  {curve[max(curve)]:.2f}": (max(curve), curve[max(curve)]) for domain, curve in curves.items()}
