"""`hf-mtp export`: converts adapters for other engines, and Uno adapters for this package."""

from enum import Enum
from typing import Annotated

import typer
from typer import Argument, Option

from .verb import verb


class Target(str, Enum):
    """What an adapter can be exported to."""

    VLLM = "vllm"
    UNO = "uno"


class Source(str, Enum):
    """Whose adapters become ours."""

    UNO = "uno"


@verb
def export(
    adapter: Annotated[str, Argument(help="Hub id or folder of the adapter.")],
    out: Annotated[str, Argument(help="The new folder, empty or missing.")],
    to: Annotated[Target | None, Option("--to", help="Write our adapter for this engine.")] = None,
    source: Annotated[
        Source | None, Option("--from", help="Convert an adapter of this format into an hf_mtp adapter.")
    ] = None,
    base: Annotated[
        str | None, Option(help="Hub id or folder of the base, if the adapter names another. Only its config is read.")
    ] = None,
    k: Annotated[
        int | None, Option(help="Masks to export to vLLM (all by default), or noise tokens of Uno's adapter (8).")
    ] = None,
) -> None:
    """Convert an adapter for vLLM or to Uno's format, which SGLang reads, or from Uno's format.

    The command only writes the new folder. Pass either --to or --from.

    Example:

        hf-mtp export out out-vllm --to vllm
        hf-mtp export s-sahoo/uno-qwen3-8B uno --from uno --base Qwen/Qwen3-8B
    """
    if (to is None) == (source is None):
        raise typer.BadParameter("Pass either --to (vllm or uno) or --from (uno), and not both.")
    if to is Target.UNO and k is not None:
        raise typer.BadParameter(
            "Uno's format does not contain the number of noise tokens, so --k has no effect. Leave out --k."
        )
    from ..export.uno import export_uno, import_uno
    from ..export.vllm import export_vllm

    if to is Target.VLLM:
        folder = export_vllm(adapter, out, base, k)
        typer.echo(f"Exported {adapter} for vLLM to {folder}.")
    elif to is Target.UNO:
        folder = export_uno(adapter, out, base)
        typer.echo(f"Exported {adapter} in Uno's format to {folder}.")
        typer.echo(f"Options of SGLang: --speculative-algorithm UNO --uno-lora-path {folder}")
    else:
        folder = import_uno(adapter, out, base, **({} if k is None else {"k": k}))
        typer.echo(
            f"Converted {adapter} to an hf_mtp adapter in {folder}. Try it: hf-mtp generate {folder} 'Your prompt'"
        )
