"""`hf-mtp check`: the command line of [`check_support`]."""

import dataclasses
import json
from typing import Annotated

import typer
from typer import Argument, Option

from .verb import verb


@verb
def check(
    model: Annotated[str, Argument(help="Hub id or folder of a base, or of its adapter. Only the config is read.")],
    as_json: Annotated[bool, Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check how a model type decodes several tokens per pass, without downloading weights.

    A tiny random model of the same type decodes with every strategy and cache, and the output is compared with plain
    decoding. The exit code is 1 if the model cannot be upgraded or an output differs.

    Example:

        hf-mtp check Qwen/Qwen3-0.6B
    """
    from ..evaluation.support import check_support

    report = check_support(model)
    fields = {**dataclasses.asdict(report), "strategy": report.strategy, "exact": report.is_exact}
    typer.echo(json.dumps(fields, indent=2) if as_json else report)
    if report.mode is None or not report.is_exact:
        raise typer.Exit(1)
