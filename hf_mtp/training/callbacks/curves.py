"""Plots a training into its output folder: losses, tokens per step, accuracy of each mask position."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback
from transformers.utils import logging

from ...base.plotting import COLOURS, GREY, can_draw, label_ends, save_png, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.get_logger(__name__)

FILE = "training_curves.png"
LOSSES = {
    "loss_base": "base",
    "loss_sampler": "sampler",
    "loss_lcm": "latent",
    "loss_auxiliary": "auxiliary",
}
LINESTYLES = {"loss_sampler": (0, (4, 1.5))}  # it would hide the base loss, which is close to it
DECODED = "eval_decoding/tokens_per_step"  # logged by DecodingCallback
MAX_LABELS = 8  # of mask positions

Points = dict[int, float]  # values by step


class TrainingCurves(TrainerCallback):
    """Plots `training_curves.png` at each save and at the end of training, if matplotlib is installed.

    An error in plotting becomes a warning and does not end training.
    """

    def on_save(self, args, state, control, **kwargs):
        self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(args, state)

    def _draw(self, args, state) -> None:
        if not state.is_world_process_zero:
            return
        if not can_draw():
            logger.info("No %s: matplotlib is not installed (`pip install hf_mtp[plots]`).", FILE)
            return
        try:
            draw_training_curves(state.log_history, Path(args.output_dir, FILE))
        except Exception as error:
            logger.warning("Could not plot %s: %s: %s", FILE, type(error).__name__, error)


def draw_training_curves(log_history: list[dict], path: Path) -> None:
    """Plots the logs of a trainer into a PNG: lines for training, circles for evaluations. Without logs, does nothing.

    Args:
        log_history (`list[dict]`): A trainer's `state.log_history`.
        path (`Path`): Path of the PNG.
    """
    if not points_of("tokens_per_step", log_history):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 9), dpi=125, layout="constrained")  # 1000 pixels wide
    figure.get_layout_engine().set(h_pad=0.15)  # inches
    losses, steps, accuracies = figure.subplots(3, 1, sharex=True)
    _draw_losses(losses, log_history)
    _draw_tokens_per_step(steps, log_history)
    _draw_accuracies(accuracies, log_history)
    evaluated = bool(points_of("eval_loss", log_history))
    accuracies.set_xlabel("training step" + " (circles: evaluation)" * evaluated)
    accuracies.xaxis.get_major_locator().set_params(integer=True)
    save_png(figure, path)


def points_of(name: str, log_history: list[dict]) -> Points:
    """Logged values of one measure, by step."""
    return {entry["step"]: entry[name] for entry in log_history if name in entry}


def _draw_losses(axes: "Axes", log_history: list[dict]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    lines = {label: name for name, label in LOSSES.items() if points_of(name, log_history)}
    colours = [COLOURS[[*LOSSES.values()].index(label)] for label in lines]
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=_ticks([*lines.values()], log_history)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    style(
        axes, "Losses", "each before its weight; base and sampler: nats per draft, latent and auxiliary: squared error"
    )
    axes.set_ylabel("loss, log scale")
    _draw_lines(axes, lines, colours, log_history)


def _ticks(names: list[str], log_history: list[dict]) -> tuple[float, ...]:
    """Ticks of a logarithmic axis within each power of ten: fewer if it spans many powers."""
    values = [value for name in names for value in points_of(name, log_history).values() if value > 0]
    span = max(values, default=1) / min(values, default=1)
    return (1,) if span > 1000 else (1, 2, 5) if span > 8 else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)


def _draw_tokens_per_step(axes: "Axes", log_history: list[dict]) -> None:

    decoded = points_of(DECODED, log_history)
    style(
        axes,
        "Tokens per step",
        "estimated on the text, without decoding" + "; diamonds: measured by decoding prompts" * bool(decoded),
    )
    axes.set_ylabel("tokens per forward pass")
    axes.plot(decoded.keys(), decoded.values(), "D", color=COLOURS[1], markersize=6)
    axes.axhline(1, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate("plain decoding", (1, 1), xytext=(-2, 4), ha="right", color=GREY, **place)
    last = [*points_of("tokens_per_step", log_history).values()][-1]
    _draw_lines(axes, {f"{last:.2f}": "tokens_per_step"}, [COLOURS[0]], log_history)


def _draw_accuracies(axes: "Axes", log_history: list[dict]) -> None:
    from matplotlib import colormaps

    logged = {name for entry in log_history for name in entry}
    k = max(int(name.removeprefix("accuracy_")) for name in logged if name.startswith("accuracy_"))
    shades = [colormaps["viridis"](0.85 * position / max(k - 1, 1)) for position in range(k)]
    style(
        axes,
        "Accuracy of each mask",
        "share of masks whose most likely token is the base's own, by position in the block",
    )
    axes.set_ylabel("accuracy")
    every = -(-k // MAX_LABELS)
    lines = {f"mask {position}": f"accuracy_{position}" for position in range(1, k + 1)}
    axes.set_ylim(0, 1)
    _draw_lines(axes, lines, shades, log_history, every)


def _draw_lines(
    axes: "Axes", lines: dict[str, str], colours: list, log_history: list[dict], label_every: int = 1
) -> None:
    """Plots a line for training and circles for evaluations, for each label and its measure."""

    ends = {}
    for label, name in lines.items():
        colour = colours[len(ends)]
        line, evaluations = points_of(name, log_history), points_of(f"eval_{name}", log_history)
        axes.plot(line.keys(), line.values(), color=colour, linewidth=1.8, linestyle=LINESTYLES.get(name, "-"))
        axes.plot(evaluations.keys(), evaluations.values(), "o", color=colour, markersize=5, markerfacecolor="white")
        ends[label] = [*line.items()][-1]
    axes.margins(x=0.02)
    axes.autoscale_view()
    labelled = [*ends][::label_every]
    label_ends(axes, {label: ends[label] for label in labelled}, colours[: len(ends)][::label_every])
