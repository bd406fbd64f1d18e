"""What the quickstart shows in the terminal: progress bars, tables, and what to type next.

Knows numbers and text. Knows nothing of models.
"""

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


def print_results(console: Console, title: str, summaries: dict[str, dict]) -> None:
    """A table with one row per kind of text, of what [`~hf_mtp.evaluation.compare.summarize`] returns."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="")
    table.add_column("\ntext")
    table.add_column("tokens\nper pass", justify="right")
    table.add_column("seconds\nplain -> mtp", justify="right")
    table.add_column("speedup\nplain / mtp", justify="right", style="bold")
    table.add_column("same\noutput", justify="right")
    for name, row in summaries.items():
        table.add_row(
            name,
            f"{row['tokens_per_step']:.2f}",
            f"{row['seconds_plain']:.1f} -> {row['seconds_mtp']:.1f}",
            f"{row['speedup_in_total']:.2f}x",
            f"{row['identical']}/{row['prompts']}",
        )
    console.print()
    console.print(Text(title, "bold"))
    console.print()
    console.print(Padding(table, (0, 0, 0, 2), expand=False))


def why_slower(passes_of_9: float, tokens_per_pass: float) -> str:
    """The reason for a slowdown.

    Args:
        passes_of_9 (`float`): Time of a pass over 9 tokens, divided by the time of one over 1 token.
        tokens_per_pass (`float`): What decoding took.
    """
    cost = f"On this computer, a pass over 9 tokens takes {passes_of_9:.1f} times as long as a pass over one token"
    if passes_of_9 > tokens_per_pass:
        return f"{cost}, but decoding gets only {tokens_per_pass:.2f} tokens per pass. So there is no speedup."
    return (
        f"{cost}, and decoding gets {tokens_per_pass:.2f} tokens per pass. The time is lost between passes: either "
        "this model is so small that drafting and Python take longer than its layers, or other programs were running."
    )


def print_why(console: Console, text: str) -> None:
    """Why something is as it is."""
    console.print()
    console.print(Padding(Text(text), (0, 0, 0, 2), expand=False))


def print_for_the_hub(console: Console) -> None:
    """What to type for another model."""
    console.print(Text("The same with a model from the Hub", "bold"))
    console.print()
    console.print(Text(FOR_THE_HUB), soft_wrap=True)
