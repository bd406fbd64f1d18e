"""The command `hf-mtp`. Each verb is a function in a file of its own, which imports torch only when it runs."""

from typing import Annotated

import typer

from .. import __version__
from .check import check
from .evaluate import evaluate
from .regenerate import regenerate
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


for _verb in (regenerate, check, verify, evaluate):
    app.command()(_verb)


def main() -> None:
    """Runs the command."""
    app()


if __name__ == "__main__":
    main()
