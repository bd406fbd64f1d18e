"""Parts of reports in Markdown. Knows nothing of what was measured."""

from ..base.machine import threads_in_words


def machine_line(machine: dict) -> str:
    """Processor, threads and versions.

    Args:
        machine (`dict`): As from [`~hf_mtp.base.machine.describe_machine`].
    """
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['processor']}, {threads_in_words(machine)}, Python {machine['python']}, {versions}"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown.

    Args:
        head (`list[str]`): Names of the columns.
        rows (`list[list[str]]`): Cells.
    """
    return "\n".join("| " + " | ".join(map(_cell, cells)) + " |" for cells in [head, ["---"] * len(head), *rows])


def _cell(text: str) -> str:
    """A text that stays within its cell, such as the name of a domain."""
    return " ".join(text.split()).replace("|", "\\|")
