"""JSON documents with a schema, such as `results.json` and `probe.json`: written from and read into dataclasses."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..base.files import write_whole

T = TypeVar("T")


def write_document(path: Path, results, rows: str) -> None:
    """Writes a dataclass with a schema as JSON. One of its fields is a long list, which gets one row on each line.

    Args:
        path (`Path`): The file.
        results: The dataclass.
        rows (`str`): Name of the field.
    """
    content = dataclasses.asdict(results)
    lines = ",\n  ".join(json.dumps(row) for row in content.pop(rows))
    head = json.dumps({"schema": content.pop("schema"), **content}, indent=1).removesuffix("\n}")
    write_whole(path, [f'{head},\n "{rows}": [\n  {lines}\n ]\n}}\n'.encode()])


def read_document(path: Path, schema: str) -> dict:
    """Reads a JSON document, and checks that it names the schema.

    Args:
        path (`Path`): The file.
        schema (`str`): Name and version.

    Raises:
        ValueError: It is not valid JSON, or has another schema.
        OSError: There is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON: {error}. Delete the file or choose another folder, and measure again."
        ) from error
    found = content.get("schema") if isinstance(content, dict) else None
    if found != schema:
        raise ValueError(f"{path} has the schema {found!r}, but this version of hf_mtp reads {schema!r}.")
    return content


def load_document(path: Path, name: str, schema: str, make: Callable[[dict], T]) -> T:
    """Reads a JSON document, and makes an object of it.

    Args:
        path (`Path`): The file, or its folder.
        name (`str`): Name of the file in that folder.
        schema (`str`): Name and version.
        make (`Callable[[dict], T]`): Makes the object from the document's content.

    Raises:
        ValueError: It is not valid JSON, has another schema, or a field is missing or unknown.
        OSError: There is no such file.
    """
    path = path / name if path.is_dir() else path
    content = read_document(path, schema)
    try:
        return make(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not follow the schema {schema!r}: {error}.") from error


def from_fields(kind: type[T], content: dict) -> T:
    """An object of a dataclass, made from all of its fields and no others.

    Args:
        kind (`type`): The dataclass.
        content (`dict`): Values by name.

    Raises:
        TypeError: A field is missing or unknown.
    """
    names = {one.name for one in dataclasses.fields(kind)}
    if names != content.keys():
        wrong = sorted(names ^ content.keys())
        raise TypeError(f"{kind.__name__} has other fields: {', '.join(wrong)}")
    return kind(**content)
