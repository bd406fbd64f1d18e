"""`hf-mtp generate`: continues one prompt."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .strategy import Strategy
from .verb import verb


@verb
def generate(
    model: Annotated[str, Argument(help="Hub id or folder of an adapter, or of a base model.")],
    prompt: Annotated[str | None, Argument(help="The text to continue. By default, stdin.")] = None,
    file: Annotated[Path | None, Option(help="Read the prompt from a file.", exists=True, dir_okay=False)] = None,
    chat: Annotated[
        bool, Option("--chat", help="Apply the chat template, with the prompt as a user message.")
    ] = False,
    max_new_tokens: Annotated[int, Option(min=1, help="Maximum number of new tokens.")] = 256,
    temperature: Annotated[float | None, Option(min=0, help="Sample at this temperature. Greedy by default.")] = None,
    top_p: Annotated[
        float | None, Option(min=0, max=1, help="Sample from the most likely tokens with this total probability.")
    ] = None,
    seed: Annotated[int | None, Option(help="Random seed for sampling.")] = None,
    plain: Annotated[bool, Option("--plain", help="One token per pass: the same text, slower.")] = False,
    strategy: Annotated[Strategy, Option(help="Decoding strategy, as mtp_strategy of generate.")] = Strategy.AUTO,
    as_json: Annotated[bool, Option("--json", help="Print a JSON document with the text and statistics.")] = False,
    dtype: Annotated[str, Option(help="Dtype of the weights, such as bfloat16.")] = "auto",
    device: Annotated[str | None, Option(help="Device, such as cuda:0. By default an accelerator, if any.")] = None,
) -> None:
    """Continue a prompt. The text streams to stdout, and a line of statistics follows on stderr.

    The prompt is an argument, a --file or stdin.

    Example:

        hf-mtp generate me/my-model-mtp "The three laws of robotics are"
    """
    text = _prompt(prompt, file)
    from ..pretrained import load_model, load_tokenizer
    from .session import Session, quiet_hosts, sampling

    quiet_hosts()
    loaded = load_model(model, dtype, device)
    settings = {"max_new_tokens": max_new_tokens, **sampling(temperature, top_p, seed)}
    session = Session(loaded, load_tokenizer(model, loaded), plain, strategy.value, **settings)
    show = (lambda piece: None) if as_json else (lambda piece: typer.echo(piece, nl=False))
    answer = session.say(text, show) if chat else session.complete(session.tokenizer(text).input_ids, show)
    if as_json:
        speeds = {"tokens_per_pass": answer.tokens_per_pass, "tokens_per_second": answer.tokens_per_second}
        typer.echo(json.dumps({"model": model, "prompt": text, **dataclasses.asdict(answer), **speeds}))
    else:
        typer.echo()
        typer.secho(f"{'plain decoding' if session.plain else model}: {answer}", err=True, dim=True)


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise typer.BadParameter("Got both a prompt and --file. Pass only one of them.")
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise typer.BadParameter(f"{file} is not UTF-8 text: {error}. Convert it to UTF-8.") from error
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            raise typer.BadParameter("Pass a prompt, --file, or text on stdin.")
        prompt = sys.stdin.read()
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # Python keeps bytes that are no text as lone surrogates
        raise typer.BadParameter(f"Character {error.start} of the prompt is not UTF-8 text. Convert it.") from error
    return prompt
