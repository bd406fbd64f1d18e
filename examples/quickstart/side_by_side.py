"""One prompt answered plainly and by `mtp=True`, in two columns that grow while the model decodes.

Knows an upgraded model and the terminal. Knows nothing of where the prompts come from.
"""

import time
from collections.abc import Callable

import torch
from peft import PeftModel
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from hf_mtp.evaluation.compare import PairedAnswers
from hf_mtp.evaluation.decoded import DecodedRows, decode_rows

SECONDS_BETWEEN = 0.15  # between two drawings, so that drawing costs hardly any of the time that is shown


class Column(BaseStreamer):
    """The text of one answer, as far as it is decoded.

    Args:
        title (`str`): What stands above it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Turns ids into text.
        draw (`Callable`): Called when there is more text, but not all the time.
    """

    def __init__(self, title: str, tokenizer: PreTrainedTokenizerBase, draw: Callable[[], None]):
        self.title, self.note, self.tokenizer, self.draw = title, "", tokenizer, draw
        self.ids: list[int] = []
        self._has_prompt, self._drawn = False, 0.0

    def put(self, value: torch.Tensor) -> None:
        """More tokens; the first ones are the prompt."""
        if self._has_prompt:
            self.ids += value.flatten().tolist()
        self._has_prompt = True
        if time.perf_counter() - self._drawn > SECONDS_BETWEEN:
            self.draw()
            self._drawn = time.perf_counter()

    def end(self) -> None:
        """All is decoded."""

    @property
    def text(self) -> str:
        """The answer so far."""
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)

    def finish(self, answer: DecodedRows) -> None:
        """Says above the text what it took."""
        self.note = f"{answer.seconds:.1f} s, {answer.tokens / answer.forward_passes:.2f} tokens per pass"


def answer_side_by_side(
    base: PreTrainedModel,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    console: Console,
) -> PairedAnswers:
    """Answers a prompt plainly, then with `mtp=True` and the default strategy, and shows both.

    Args:
        base ([`~transformers.PreTrainedModel`]): The model without an adapter.
        model ([`~peft.PeftModel`]): The same, upgraded.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer, with a chat template.
        prompt (`str`): What the user says.
        max_new_tokens (`int`): Most new tokens.
        console ([`~rich.console.Console`]): Where to show it.
    """
    ids = encoded(tokenizer, prompt)
    with Live(console=console, auto_refresh=False) as live:

        def draw() -> None:
            live.update(two_columns(prompt, columns), refresh=console.is_terminal)

        columns = [Column(title, tokenizer, draw) for title in ("plain", "mtp=True")]
        plain = decode_rows(base, [ids], max_new_tokens, streamer=columns[0])
        columns[0].finish(plain)
        fast = decode_rows(model, [ids], max_new_tokens, streamer=columns[1], mtp=True)
        columns[1].finish(fast)
        live.update(two_columns(prompt, columns))
    console.print()
    return PairedAnswers(plain, fast)


def encoded(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The token ids of a conversation that begins with this prompt."""
    options = {"add_generation_prompt": True, "return_dict": True}
    return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options)["input_ids"]


def two_columns(prompt: str, columns: list[Column]) -> Table:
    """The prompt above both answers."""
    table = Table(title=Text(prompt, "italic"), title_justify="left", expand=True, header_style="")
    for column in columns:
        table.add_column(Text(f"{column.title}  {column.note}".strip(), "bold"), ratio=1)
    table.add_row(*(Text(column.text) for column in columns))
    return table
