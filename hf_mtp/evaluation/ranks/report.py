"""The report of a probe: tables in Markdown, and figures."""

from pathlib import Path

from ...base.files import write_whole
from ...base.plotting import can_draw
from ..markdown import machine_line, markdown_table
from ..measures import ALL
from .figures import draw_ranks
from .results import TOPS, ProbeResults

TABLE = "probe.md"


def write_probe(results: ProbeResults, folder: str | Path) -> list[Path]:
    """Writes `probe.md`, the heatmap and the cumulative histogram. Without matplotlib there are no pictures.

    Args:
        results ([`ProbeResults`]): The results.
        folder (`str` or `Path`): Where to write.

    Returns:
        `list[Path]`: The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / TABLE, [probe_page(results).encode()])
    return [folder / TABLE, *(draw_ranks(results, folder) if can_draw() else [])]


def probe_page(results: ProbeResults) -> str:
    """The whole of `probe.md`.

    Args:
        results ([`ProbeResults`]): The results.
    """
    sections = {
        "All positions": f"{rank_table(results)}\n\n{papers_claim(results)}",
        **{f"Share in the top {top}, by position": position_table(results, top) for top in TOPS},
        "How it was measured": probe_notes(results),
    }
    settings = results.settings
    title = f"# How well {settings.model} predicts tokens beyond the next one, on {settings.suite['name']}\n"
    return "\n".join([title, *(f"## {name}\n\n{text}\n" for name, text in sections.items())])


def rank_table(results: ProbeResults) -> str:
    """By source: the share of true tokens among the likeliest 1, 10 and 200, and the median rank."""
    rows = [
        [source, *(f"{getattr(row[ALL], f'top_{top}'):.1%}" for top in TOPS), f"{row[ALL].median:g}"]
        for source, row in results.summaries.items()
    ]
    return markdown_table(["source", *(f"top {top}" for top in TOPS), "median rank"], rows)


def position_table(results: ProbeResults, top: int) -> str:
    """By source and position: the share of true tokens among the likeliest `top`.

    Args:
        results ([`ProbeResults`]): The results.
        top (`int`): 1, 10 or 200.
    """
    positions = [position for position in next(iter(results.summaries.values())) if position != ALL]
    rows = [
        [source, *(f"{getattr(row[position], f'top_{top}'):.0%}" for position in positions)]
        for source, row in results.summaries.items()
    ]
    return markdown_table(["source", *positions], rows)


def papers_claim(results: ProbeResults) -> str:
    """The claim of the paper, and what was found instead.

    Args:
        results ([`ProbeResults`]): The results.
    """
    pooled = {source: row[ALL] for source, row in results.summaries.items()}
    best = max(results.placeholders, key=lambda source: pooled[source].top_200)
    found = [f"{pooled[best].top_200:.0%} are in the top 200 at the best placeholder (“{best}”)"]
    found += [
        f"{row.top_10:.0%} in the top 10 at “{source}”"
        for source, row in pooled.items()
        if source not in results.placeholders
    ]
    return (
        "The paper reports for its own model that the true future tokens are in the top 200 before training, and in "
        f"the top 10 after it. Here {', '.join(found)}."
    )


def probe_notes(results: ProbeResults) -> str:
    """How the ranks were measured."""
    settings, adapter = results.settings, results.settings.adapter
    about = "no adapter" if adapter is None else f"adapter {adapter['fingerprint']}, r={adapter['r']}"
    lines = [
        "The texts are the base's own greedy answers. Position i after a token stands for the i-th token that "
        "follows, and predicts the one after that. Ranks are over the whole vocabulary; rank 1 is the most likely "
        "token.",
        f"{len(results.texts)} of {settings.suite['prompts']} prompts, at most {settings.max_new_tokens} new tokens, "
        f"k={settings.k}, {settings.dtype} on {settings.machine.get('accelerator', settings.device)}; "
        f"{machine_line(settings.machine)}; {about}.",
        *(f"Left out: {name}. {reason}" for name, reason in results.left_out.items()),
    ]
    return "\n\n".join(lines) + "\n"
