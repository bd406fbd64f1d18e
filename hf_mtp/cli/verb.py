"""Wraps every subcommand: registers the adapter type, and turns an error into one paragraph and an exit code."""

import functools
import inspect
import io
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

CLOSED_PIPE = 141  # as shells have it for a process that writes to a pipe that nobody reads
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
# Errors whose message says all. Of others, such as a KeyError, the name helps too.
SELF_EXPLANATORY = (ValueError, OSError, NotImplementedError, RuntimeError, ImportError, TypeError)


def verb(function: Callable, error_code: int = 1) -> Callable:
    """Turns a function into a subcommand: adds `--debug`, and reports errors on stderr with an exit code.

    Wrong usage has exit code 2, as in typer. Modules of subcommands import nothing heavy: their functions do.

    Args:
        function (`Callable`): Its parameters are the arguments and options of the verb, as typer reads them.
        error_code (`int`, *optional*, defaults to 1): The exit code of errors, for verbs in which 1 is an answer.
    """

    @functools.wraps(function)
    def run(*args, debug: bool = False, **kwargs):
        _accept_any_text()
        try:
            from ..registration import register

            register()
            with warnings.catch_warnings():
                if not debug:  # plans of the host libraries, which tell a user of the command nothing
                    warnings.simplefilter("ignore", FutureWarning)
                return function(*args, **{name: _expanded(value) for name, value in kwargs.items()})
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _stdout_is_closed():
                raise typer.Exit(CLOSED_PIPE) from None
            if debug:
                raise
            typer.secho(_paragraph(error), err=True, fg="red")
            raise typer.Exit(error_code) from error

    own = inspect.signature(function)
    added = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), added])
    run.__annotations__ = {**function.__annotations__, "debug": Debug}
    return run


def run_alone(function: Callable) -> None:
    """Runs one verb as a command of its own.

    Args:
        function (`Callable`): The verb.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    app.command()(function)
    app()


def _expanded(value):
    """A path in the home folder where it is one, as shells leave `--output=~/out`. Other values stay."""
    return value.expanduser() if isinstance(value, Path) else value


def _accept_any_text() -> None:
    """Writes `?` for what the encoding of stdout lacks, as that of files on Windows does. It would be an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _stdout_is_closed() -> bool:
    """Whether nobody reads stdout any more, as after `| head -1`. If so, stdout is discarded from now on."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails when it flushes at its end
        return True
    return False


def _paragraph(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}."  # without the number of the error
    is_clear = text and isinstance(error, SELF_EXPLANATORY)
    what = text if is_clear else f"{type(error).__name__}: {text}".rstrip(": ")
    return f"Error: {what} (--debug shows the traceback.)"
