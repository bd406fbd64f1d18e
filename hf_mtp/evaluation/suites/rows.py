"""Reads rows from a file that a user wrote: JSON Lines, JSON, CSV or Parquet, in the usual encodings of Unicode.

Knows nothing of what the rows mean. Errors name the file and the line.
"""

import codecs
import csv
import io
import json
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_rows(path: Path) -> list[dict]:
    """The rows of a file.

    Args:
        path (`Path`): A file with one of the endings `.jsonl`, `.json` (a list of objects), `.csv`, `.tsv` or
            `.parquet`.

    Raises:
        ValueError: The ending is another one, the text is no Unicode, or a line is no row.
        OSError: The file cannot be read.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is not a supported file of rows. Supported extensions are {', '.join(SUFFIXES)}.")
    if path.suffix == ".parquet":
        from datasets import Dataset

        return Dataset.from_parquet(str(path)).to_list()
    text = read_text(path)
    if path.suffix == ".jsonl":
        return [_row(line, f"{path}, line {number}") for number, line in _lines(text)]
    if path.suffix == ".json":
        return _rows_of_json(text, path)
    return list(csv.DictReader(io.StringIO(text), delimiter="," if path.suffix == ".csv" else "\t"))


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Args:
        path (`Path`): The file.

    Raises:
        ValueError: It is in none of these.
    """
    content = path.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8: byte {error.start} is 0x{content[error.start]:02x}. Save it as UTF-8, for "
            f"example with `iconv -f latin1 -t utf8 {path.name}` if it is in Latin-1."
        ) from error


def _lines(text: str) -> list[tuple[int, str]]:
    """Lines that are not blank, with their numbers. Only line feeds separate them: texts may hold other separators."""
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a JSON object with columns, but got {type(row).__name__}.")
    return row


def _rows_of_json(text: str, path: Path) -> list[dict]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON: {error}. If it has one object per line, it is JSON Lines: rename it to .jsonl."
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must contain a JSON list of objects, one per row.")
    return rows
