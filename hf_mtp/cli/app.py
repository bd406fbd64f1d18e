"""The subcommands of `hf-mtp`. Each verb is a function in a file of its own, which imports torch only when it runs."""

from typing import Annotated

import typer

from .. import __version__
from .chat import chat
from .check import check
from .demo import demo
from .evaluate import evaluate
from .export import export
from .generate import generate
from .ngrams import ngrams
from .probe import probe
from .push import push
from .regenerate import regenerate
from .serve import serve
from .train import train
from .verify import verify

app = typer.Typer(
    name="hf-mtp",
    help="Multi-token prediction: any causal language model generates several tokens per pass, with the same output.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # `verb` reports errors
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""


# The fields of a trainer's config are parsed by TRL.
ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}

for _verb in (generate, chat, demo, serve, verify, evaluate, probe, regenerate, ngrams, check, push, export):
    app.command()(_verb)
app.command(context_settings=ANY_OPTION)(train)
