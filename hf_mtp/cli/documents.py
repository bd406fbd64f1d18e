"""JSON documents for scripts: in a file, or alone on stdout."""

from pathlib import Path

import typer

STDOUT = Path("-")  # as commands name it


def check_path(path: Path | None) -> None:
    """Checks, before any work that would be lost, that a document can be written there; makes its folder.

    Args:
        path (`Path`, *optional*): As for [`write_json`].

    Raises:
        OSError: It is a folder, or it cannot be written there.
    """
    if path is None or path == STDOUT:
        return
    if path.is_dir():
        raise IsADirectoryError(f"--json writes to a file, but {path} is a folder. Add the name of a file.")
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise OSError(f"--json cannot write to {path}: {error.strerror}. Pass a file that can be written.") from error
    if is_new:
        path.unlink()  # so that no empty document stays after an error


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
