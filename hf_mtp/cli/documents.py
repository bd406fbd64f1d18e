"""JSON documents for scripts: in a file, or alone on stdout."""

from pathlib import Path

import typer

STDOUT = Path("-")  # as commands name it


def write_json(text: str, path: Path | None) -> None:
    """Writes a JSON document where a verb's `--json` wants it.

    Args:
        text (`str`): The JSON.
        path (`Path`, *optional*): A file, `-` for stdout, or `None` for nowhere.
    """
    if path == STDOUT:
        typer.echo(text.rstrip("\n"))
    elif path is not None:
        path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def say(text: str, path: Path | None) -> None:
    """Prints text for people: on stderr if the document takes stdout.

    Args:
        text (`str`): The text.
        path (`Path`, *optional*): Where the document goes.
    """
    typer.echo(text, err=path == STDOUT)
