"""`hf-mtp chat`: a conversation in the terminal."""

from itertools import cycle
from typing import Annotated

from typer import Argument, Option

from .strategy import Strategy
from .verb import verb

TINTS = ("cyan", "green", "yellow", "magenta")
HELP = "/plain switches multi-token prediction off and on, /clear clears the conversation, /exit quits."


@verb
def chat(
    model: Annotated[str, Argument(help="Hub id or folder of an adapter, or of a base model.")],
    system: Annotated[str | None, Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Maximum number of tokens per answer.")] = 512,
    temperature: Annotated[float | None, Option(min=0, help="Sample at this temperature. Greedy by default.")] = None,
    top_p: Annotated[
        float | None, Option(min=0, max=1, help="Sample from the most likely tokens with this total probability.")
    ] = None,
    seed: Annotated[int | None, Option(help="Random seed for sampling.")] = None,
    plain: Annotated[bool, Option("--plain", help="Start with one token per pass.")] = False,
    strategy: Annotated[Strategy, Option(help="Decoding strategy, as mtp_strategy of generate.")] = Strategy.AUTO,
    dtype: Annotated[str, Option(help="Dtype of the weights, such as bfloat16.")] = "auto",
    device: Annotated[str | None, Option(help="Device, such as cuda:0. By default an accelerator, if any.")] = None,
) -> None:
    """Chat in the terminal. Tokens from the same forward pass have the same color.

    A line after each answer compares its speed with plain decoding, which is measured at the start. /plain switches
    multi-token prediction off and on, /clear clears the conversation, /exit quits, Ctrl-C stops an answer.

    Example:

        hf-mtp chat me/my-model-mtp
    """
    from rich.console import Console

    from ..pretrained import load_model, load_tokenizer
    from .session import Session, quiet_hosts, sampling

    quiet_hosts()
    console = Console(highlight=False)
    loaded = load_model(model, dtype, device)
    settings = {"max_new_tokens": max_new_tokens, **sampling(temperature, top_p, seed)}
    session = Session(loaded, load_tokenizer(model, loaded), plain, strategy.value, system=system, **settings)
    speed = session.plain_speed()
    console.print(f"{model}. Plain decoding runs at {speed:.1f} tokens/s here. {HELP}", style="dim", markup=False)
    while (text := _ask(console)) is not None:
        if text == "/plain":
            session.plain = not session.plain or not session.is_upgraded
            console.print("One token per pass." if session.plain else "Several tokens per pass.", style="dim")
        elif text == "/clear":
            session.clear()
        elif text.startswith("/"):
            console.print(HELP, style="dim", markup=False)
        elif text:
            _answer(console, session, text, speed)


def _ask(console) -> str | None:
    """What the user types; `None` at the end."""
    try:
        text = console.input("[bold]> [/bold]").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return None if text in ("/exit", "/quit") else text


def _answer(console, session, text: str, speed: float) -> None:
    tints = cycle(TINTS)

    def show(piece: str) -> None:
        console.print(piece, style=next(tints), markup=False, end="", soft_wrap=True)

    try:
        answer = session.say(text, show)
    except KeyboardInterrupt:
        console.print("\n(stopped)", style="dim")
        return
    console.print(f"\n{answer}, {answer.tokens_per_second / speed:.2f}x plain decoding", style="dim", markup=False)
