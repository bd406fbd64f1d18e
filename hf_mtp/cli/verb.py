"""Wraps every subcommand: registers the adapter type, and turns an error into one paragraph and an exit code."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Annotated

import typer

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
        try:
            from ..registration import register

            register()
            with warnings.catch_warnings():
                if not debug:  # plans of the host libraries, which tell a user of the command nothing
                    warnings.simplefilter("ignore", FutureWarning)
                return function(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
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


def _paragraph(error: Exception) -> str:
    text = " ".join(str(error).split())
    is_clear = text and isinstance(error, SELF_EXPLANATORY)
    what = text if is_clear else f"{type(error).__name__}: {text}".rstrip(": ")
    return f"Error: {what} (--debug shows the traceback.)"
