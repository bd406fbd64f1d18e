"""Writes the report of an evaluation: the tables, the plots and the section of a model card."""

from pathlib import Path

from ...adapter.card import EVALUATION_BEGIN, EVALUATION_END, README, is_replaceable, write_model_card
from ...adapter.config import GatedLoraConfig
from ...base.files import write_whole
from ...base.plotting import can_draw
from .curves import draw_curves
from .results import Results
from .tables import card_section, table_page

TABLE = "table.md"


def write_report(results: Results, folder: str | Path) -> list[Path]:
    """Writes `table.md` and the curves. Without matplotlib there are no curves.

    Args:
        results ([`Results`]): The results.
        folder (`str` or `Path`): Where to write.

    Returns:
        `list[Path]`: The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / TABLE, [table_page(results).encode()])
    return [folder / TABLE, *(draw_curves(results, folder) if can_draw() else [])]


def write_card_section(results: Results, adapter: str | Path) -> Path:
    """Writes the results into an adapter's model card, in place of the section of an earlier evaluation.

    A card that hf_mtp wrote also gets the tokens per pass of each domain; they are kept in the adapter's config.

    Args:
        results ([`Results`]): Complete results.
        adapter (`str` or `Path`): Folder of the adapter.

    Returns:
        `Path`: The card.

    Raises:
        ValueError: The results are partial, the folder has no adapter, or the earlier section has no mark of its end.
    """
    folder = Path(adapter)
    if not results.complete:
        raise ValueError(
            "The evaluation was interrupted, and partial results are not written to a model card. "
            "Finish the evaluation first."
        )
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} is not the folder of an adapter: it has no adapter_config.json. Pass an adapter's folder; "
            "download the adapter first, for example with `hf download`."
        )
    card = folder / README
    _refuse_open_section(card)
    if is_replaceable(card):
        config = GatedLoraConfig.from_pretrained(str(folder))
        config.tokens_per_pass = _tokens_per_pass(results)
        config.save_pretrained(folder)
        write_model_card(config, folder)
    text = card.read_text(encoding="utf-8")
    before, _, rest = text.partition(EVALUATION_BEGIN)
    after = rest.partition(EVALUATION_END)[2].lstrip("\n")
    after = f"\n{after}" if after else ""
    write_whole(card, [f"{before.rstrip()}\n\n{card_section(results)}{after}".encode()])
    return card


def _refuse_open_section(card: Path) -> None:
    """Raises if the end of the earlier section cannot be told, since the text after it would be lost."""
    section = card.read_text(encoding="utf-8").partition(EVALUATION_BEGIN)[1:] if card.is_file() else ("", "")
    if section[0] and EVALUATION_END not in section[1]:
        raise ValueError(
            f"{card} has the line `{EVALUATION_BEGIN}`, but not `{EVALUATION_END}` after it. Add this line where the "
            "earlier evaluation ends, or delete both."
        )


def _tokens_per_pass(results: Results) -> dict[str, float]:
    """Tokens per pass of each domain, by the multi-token method with the most over all domains."""
    ours = {method["name"] for method in results.settings.methods if method["k"] is not None}
    overall = results.overall
    best = max((name for name in overall if name in ours), key=lambda name: overall[name].tokens_per_pass)
    return {f"{domain} ({best})": round(row[best].tokens_per_pass, 2) for domain, row in results.domains.items()}
