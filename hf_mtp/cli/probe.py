"""`hf-mtp probe`: the command line of [`~hf_mtp.evaluation.probe`]."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .verb import verb


@verb
def probe(
    model: Annotated[str, Argument(help="Hub id or folder of a base model, or of an adapter.")],
    adapter: Annotated[str | None, Option(help="Hub id or folder of the adapter, if the model is a base.")] = None,
    suite: Annotated[str, Option(help="A file of prompts, or the name of a suite.")] = "quick",
    limit: Annotated[int, Option(min=1, help="Maximum number of prompts per domain.")] = 2,
    max_new_tokens: Annotated[int, Option(min=1, help="Maximum number of new tokens per answer.")] = 64,
    dtype: Annotated[
        str, Option(help="Dtype of the base, such as bfloat16; auto is that of the checkpoint.")
    ] = "auto",
    output: Annotated[Path, Option(help="Folder for probe.json, probe.md and the figures.")] = Path("probe"),
) -> None:
    """Show how well a model predicts tokens beyond the next one, before and after training.

    The base answers prompts greedily. The rank of each true future token is measured at placeholders of the untouched
    base, at the adapter's masks, and after the sampler head. Without an adapter, only placeholders are measured.

    Example:

        hf-mtp probe Qwen/Qwen3-0.6B --adapter me/qwen3-mtp
    """
    from ..base.plotting import can_draw
    from ..evaluation.ranks.probe import probe as run
    from ..evaluation.ranks.report import papers_claim, rank_table, write_probe
    from ..evaluation.suites.suite import load_suite
    from ..pretrained import load_with_tokenizer

    prompts = load_suite(suite)
    loaded, tokenizer = load_with_tokenizer(model, adapter, dtype)
    results = run(loaded, tokenizer, prompts, max_new_tokens=max_new_tokens, limit=limit, output=output)
    write_probe(results, output)
    typer.echo(f"{rank_table(results)}\n\n{papers_claim(results)}\n")
    typer.echo(f"All ranks are in {output}{'' if can_draw() else ', but no figures: matplotlib is not installed'}.")
