"""`hf-mtp verify`: the command line of [`~hf_mtp.evaluation.verify`]."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from .documents import STDOUT, check_path, say, write_json
from .lists import words
from .verb import verb

if TYPE_CHECKING:
    from ..evaluation.exactness.verify import Comparison, VerifyReport

DIFFERENT, ERROR = 1, 2


@partial(verb, error_code=ERROR)
def verify(
    model: Annotated[str, Argument(help="Hub id or folder of a base model, or of an adapter.")],
    adapter: Annotated[str | None, Option(help="Hub id or folder of the adapter, if the model is a base.")] = None,
    suite: Annotated[str, Option(help="A file of prompts, or the name of a suite.")] = "quick",
    strategies: Annotated[str, Option(help="Strategies, separated by commas.")] = "auto,quadratic,linear",
    dtype: Annotated[
        str, Option(help="Dtypes of the base, separated by commas; auto is that of the checkpoint.")
    ] = "auto",
    k: Annotated[int | None, Option(help="Masks per block. By default the adapter's k.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Prompts per call of generate.")] = 1,
    max_new_tokens: Annotated[int, Option(min=1, help="Maximum number of new tokens per answer.")] = 64,
    limit: Annotated[int, Option(min=1, help="Maximum number of prompts per domain.")] = 2,
    greedy_only: Annotated[bool, Option("--greedy-only", help="Do not compare sampling.")] = False,
    as_json: Annotated[
        Path | None,
        Option(
            "--json", help="Write the report to this file as JSON; with -, JSON goes to stdout and text to stderr."
        ),
    ] = None,
) -> None:
    """Check that `mtp=True` gives the same output as plain decoding, token by token.

    Samples are compared with plain decoding under the same noise, and their distribution with a two-sample test. The
    exit code is 0 if everything is equal, 1 if something differs, and 2 after an error.

    Example:

        hf-mtp verify Qwen/Qwen3-0.6B --adapter me/qwen3-mtp --dtype float32,bfloat16
    """
    from ..evaluation.exactness.verify import verify as run
    from ..evaluation.suites.suite import load_suite
    from ..pretrained import load_upgraded, refuse_dtype

    check_path(as_json)
    if not (dtypes := words(dtype)):
        raise typer.BadParameter(f"--dtype takes at least one dtype, such as auto, but got {dtype!r}.")
    for name in dtypes:
        refuse_dtype(name)
    prompts, reports, tokenizer = load_suite(suite), [], None
    for name in dtypes:
        loaded, tokenizer = load_upgraded(model, adapter, name)
        reports.append(
            run(
                loaded,
                tokenizer,
                prompts,
                strategies=words(strategies),
                k=k,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                limit=limit,
                sampling=not greedy_only,
            )
        )
        if as_json != STDOUT:  # at once, so that an error in the next dtype loses nothing
            write_json(_as_json(reports), as_json)
        say(_as_text(reports[-1], tokenizer), as_json)
    if as_json == STDOUT:
        write_json(_as_json(reports), as_json)
    if not all(report.is_equal for report in reports):
        raise typer.Exit(DIFFERENT)


def _as_json(reports: list["VerifyReport"]) -> str:
    is_equal = all(report.is_equal for report in reports)
    return json.dumps({"equal": is_equal, "reports": [report.to_dict() for report in reports]}, indent=1)


def _as_text(report: "VerifyReport", tokenizer) -> str:
    lines = [f"{report.dtype}, batch {report.batch_size}, up to {report.max_new_tokens} new tokens"]
    for comparison in report.comparisons:
        lines += _lines(comparison, tokenizer)
    if report.p_value is not None:
        lines.append(f"  two-sample test of sampled texts against the base's: p = {report.p_value:.4f}")
    lines += [f"  left out: prompt {name}. {reason}" for name, reason in report.left_out.items()]
    divergences = [one for comparison in report.comparisons for one in comparison.divergences]
    verdict = "equal" if report.is_equal else "DIFFERENT"
    if divergences and report.is_distributed_equally and all(one.is_tie for one in divergences):
        verdict += ", at ties only: rounding alone decides between these tokens"
    return "\n".join([*lines, f"  {verdict}"])


def _lines(comparison: "Comparison", tokenizer) -> list[str]:
    name = f"  {comparison.mode}, {comparison.method}"
    if comparison.refused:
        return [f"{name}: refused. {comparison.refused}"]
    equal = comparison.answers - len(comparison.divergences)
    lines = [f"{name}: {equal} of {comparison.answers} answers equal"]
    for one in comparison.divergences:
        plain, other = (_shown(token, tokenizer) for token in (one.plain_token, one.other_token))
        lines.append(f"    {one.prompt}, new token {one.position}: plain {plain}, here {other}{_gap(one)}")
    return lines


def _shown(token: int | None, tokenizer) -> str:
    return "has ended" if token is None else f"{tokenizer.decode([token])!r} ({token})"


def _gap(one) -> str:
    if one.units is None:
        return ""
    unit = "unit" if one.units == 1 else "units"
    return f"; {one.units:g} {unit} of rounding apart, {'a tie' if one.is_tie else 'NO tie'}"
