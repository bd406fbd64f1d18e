"""`hf-mtp evaluate`: the command line of [`~hf_mtp.evaluation.evaluate`]."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .documents import check_path, say, write_json
from .lists import numbers, words
from .verb import verb

INTERRUPTED = 130  # as shells have it for a process that Ctrl-C ended


@verb
def evaluate(
    model: Annotated[str, Argument(help="Hub id or folder of a base model, or of an adapter.")],
    adapter: Annotated[str | None, Option(help="Hub id or folder of the adapter, if the model is a base.")] = None,
    suite: Annotated[
        str, Option(help="quick, paper, the name of a benchmark such as spec-bench, a file, or a dataset of the Hub.")
    ] = "quick",
    k: Annotated[str | None, Option(help="Values of k (masks per block), separated by commas.")] = None,
    strategies: Annotated[str, Option(help="Strategies, separated by commas.")] = "auto,quadratic,linear",
    batch_size: Annotated[int, Option(min=1, help="Prompts per call of generate.")] = 1,
    limit: Annotated[int | None, Option(min=1, help="Maximum number of prompts per domain.")] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Maximum number of new tokens per answer.")] = 128,
    dtype: Annotated[
        str, Option(help="Dtype of the base, such as bfloat16; auto is that of the checkpoint.")
    ] = "auto",
    data: Annotated[Path | None, Option(help="Folder with local copies of benchmarks, such as gsm8k.jsonl.")] = None,
    output: Annotated[Path, Option(help="Folder for results.json, table.md and the curves.")] = Path("evaluation"),
    as_json: Annotated[
        Path | None,
        Option(
            "--json",
            help="Write a copy of results.json to this file; with -, JSON goes to stdout and tables to stderr.",
        ),
    ] = None,
    card: Annotated[bool, Option("--card", help="Write the results into the adapter's model card.")] = False,
) -> None:
    """Measure tokens per pass and speed over domains, k and strategies, against plain decoding and prompt lookup.

    Every prompt is decoded with all methods in turn. Ctrl-C keeps finished results, and the same command resumes.

    Example:

        hf-mtp evaluate Qwen/Qwen3-0.6B --adapter me/qwen3-mtp --suite paper --limit 20
    """
    from ..base.plotting import can_draw
    from ..evaluation.speed.report import write_card_section, write_report
    from ..evaluation.speed.results import FILE
    from ..evaluation.speed.runner import evaluate as run
    from ..evaluation.speed.tables import tokens_table
    from ..evaluation.suites.suite import load_suite
    from ..pretrained import load_upgraded

    check_path(as_json)
    wanted, prompts = numbers(k, "--k"), load_suite(suite, limit, data)
    folder = Path(adapter or model)
    if card and not folder.is_dir():
        raise typer.BadParameter(f"--card writes into the folder of an adapter, but {folder} is not a folder.")
    loaded, tokenizer = load_upgraded(model, adapter, dtype)
    results = run(
        loaded,
        tokenizer,
        prompts,
        strategies=words(strategies),
        k=wanted,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        output=output,
    )
    write_report(results, output)
    write_json((output / FILE).read_text(encoding="utf-8"), as_json)
    if results.domains:
        say(f"Tokens per pass:\n\n{tokens_table(results)}\n", as_json)
    missing = "" if can_draw() else ", but no curves: matplotlib is not installed"
    say(f"All results are in {output}{missing}.", as_json)
    if not results.complete:
        typer.echo("Interrupted. Finished results are kept; run the same command to resume.", err=True)
        raise typer.Exit(INTERRUPTED)
    if card:
        say(f"The results are also in {write_card_section(results, folder)}.", as_json)
