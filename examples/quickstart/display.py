"""What the quickstart shows in the terminal: progress bars, the table, a sample with its steps.

Knows numbers and text. Knows nothing of models.
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

FOR_THE_HUB = """\
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_mtp import GatedLoraConfig, MTPConfig, MTPTrainer

base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
model = get_peft_model(base, GatedLoraConfig(k=8))
dataset = load_dataset("trl-lib/Capybara", split="train")
MTPTrainer(model=model, args=MTPConfig(output_dir="out"), train_dataset=dataset).train()

inputs = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")("The sea is", return_tensors="pt").to(model.device)
model.generate(**inputs, mtp=True, do_sample=False)  # same text, fewer forward passes
model.push_to_hub("me/Qwen3-0.6B-mtp")  # adapter, sampler head and mask embeddings
"""
STEP_STYLES = ("black on bright_cyan", "black on bright_yellow")


def make_console() -> Console:
    """The terminal, or what stands in for it; in the latter case as wide as the widest line shown."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


@contextmanager
def progress(console: Console, description: str, total: float | None = None) -> Iterator["Bar"]:
    """Within, one progress bar. Without a `total` it only shows that something is going on."""
    columns = (
        TextColumn("{task.description:<30}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:
        bar = Bar(bars, bars.add_task(description, total=total, note=""))
        yield bar
        bar.finish()


class Bar:
    """A progress bar with a note at its end."""

    def __init__(self, bars: Progress, task: int):
        self._bars, self._task = bars, task

    def advance(self) -> None:
        """One more is done."""
        self._bars.advance(self._task)

    def show(self, done: float, note: str) -> None:
        """So much is done, and this is to be said about it."""
        self._bars.update(self._task, completed=done, note=note)

    def note(self, text: str) -> None:
        """What is to be said about it."""
        self._bars.update(self._task, note=text)

    def finish(self) -> None:
        """All is done, whatever `total` said."""
        total = self._bars.tasks[0].total or 1
        self._bars.update(self._task, total=total, completed=total)


def print_results(console: Console, summaries: dict[str, dict], k: int, max_new_tokens: int) -> None:
    """A table with one row per domain of what [`summarize`] in `measure.py` returns."""
    count = max(summary["prompts"] for summary in summaries.values())
    prompts = f"{count} held-out prompt{'' if count == 1 else 's'} per domain"
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="")
    table.add_column("\ndomain")
    table.add_column("tokens\nper step", justify="right", style="bold")
    table.add_column("forward passes\nplain -> mtp", justify="right")
    table.add_column("wall clock\nplain / mtp", justify="right")
    table.add_column("same\noutput", justify="right")
    table.add_column("repeated\n4-grams", justify="right")
    for domain, summary in summaries.items():
        table.add_row(
            domain,
            f"{summary['tokens_per_step']:.2f}",
            f"{summary['forward_passes_plain']:,} -> {summary['forward_passes_mtp']:,}",
            f"{summary['speedup']:.2f}x",
            f"{summary['identical']}/{summary['prompts']}",
            f"{summary['repeated_4grams']:.0%}",
        )
    console.print()
    console.print(Text(f"{prompts}, greedy, up to {max_new_tokens} new tokens, k={k}", "bold"))
    console.print()
    console.print(Padding(table, (0, 0, 0, 2), expand=False))


def print_fastest(console: Console, speedups: dict[str, dict[int, float]]) -> None:
    """Which k is the fastest here, by the wall-clock speed-ups of each domain by k."""
    every_k = next(iter(speedups.values()))
    best = max(every_k, key=lambda k: statistics.geometric_mean(curve[k] for curve in speedups.values()))
    by_domain = ", ".join(f"{curve[best]:.2f}x for {domain}" for domain, curve in speedups.items())
    is_faster = all(curve[best] > 1 for curve in speedups.values())
    verdict = "is the fastest here" if is_faster else "comes closest to plain decoding here"
    console.print()
    console.print("A pass computes up to (k + 1)^2 positions, which a CPU feels with a base as small as this one.")
    console.print(f"By the wall clock, mtp_k={best} {verdict}: {by_domain}.")


def steps_of_text(pieces: list[str], in_colour: bool) -> Text:
    """Text that shows which of it came in one forward pass: in alternating colours, or between bars."""
    if not in_colour:
        return Text("|".join(pieces))
    text = Text()
    for index, piece in enumerate(pieces):
        text.append(piece, style=STEP_STYLES[index % 2])
    return text


def print_sample(console: Console, prompt: str, pieces: list[str], tokens: int, domain: str) -> None:
    """One prompt and its answer, one piece per forward pass."""
    in_colour = console.color_system is not None
    mark = "the colour changes" if in_colour else "a | stands"
    console.print()
    console.print(Text(f"A typical answer, the median of {domain}", "bold"))
    console.print(f"{tokens} tokens in {len(pieces)} forward passes; {mark} where the next one begins.")
    console.print(Padding(Text(prompt, "dim"), (1, 0, 0, 2), expand=False))
    console.print(Padding(steps_of_text(pieces, in_colour), (1, 0, 1, 2), expand=False))


def print_for_the_hub(console: Console) -> None:
    """What to type for another model."""
    console.print(Text("The same for a model of the Hub", "bold"))
    console.print()
    console.print(Text(FOR_THE_HUB), soft_wrap=True)
