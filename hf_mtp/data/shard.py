"""One process's part of a dataset on disk: a JSON Lines file that grows in batches and becomes visible when
complete."""

import json
import os
from pathlib import Path
from typing import BinaryIO

from ..base.files import write_whole


class Shard:
    """The rows of one process, which are computed in any order and stored in the dataset's order.

    Batches go to a hidden file, so that nobody reads half a dataset. After the last batch the file becomes
    `train-00000-of-00001.jsonl`, the name by which `load_dataset` finds the shards of a split. An interruption loses
    nothing that was computed.

    Args:
        folder (`Path`): Where all shards are.
        index, count (`int`): Which shard this is, of how many.
    """

    def __init__(self, folder: Path, index: int, count: int):
        self.folder, self.count = folder, count
        name = f"train-{index:05d}-of-{count:05d}"
        self.path = folder / f"{name}.jsonl"
        self._part = folder / f".{name}.part"
        self._arguments = folder / f".{name}.arguments.json"

    @property
    def is_whole(self) -> bool:
        """Whether all rows are there."""
        return self.path.is_file()

    def claim(self, arguments: dict) -> None:
        """Makes sure that all rows in the folder come from the same arguments.

        Args:
            arguments (`dict`): Everything that the rows depend on, in types that JSON has.

        Raises:
            ValueError: The folder holds rows made with other arguments, by another number of processes, or of unknown
            origin.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._refuse_strangers()
        if not self._arguments.is_file():
            write_whole(self._arguments, [json.dumps(arguments, indent=1).encode()])
            return
        made_with = json.loads(self._arguments.read_text(encoding="utf-8"))
        names = dict.fromkeys([*arguments, *made_with])  # some may have been left out this time
        other = [name for name in names if made_with.get(name) != arguments.get(name)]
        if other:
            differences = ", ".join(f"{name} {made_with.get(name)!r}, not {arguments.get(name)!r}" for name in other)
            raise ValueError(
                f"{self.folder} contains rows that were made with other arguments: {differences}. Use the same "
                "arguments to resume, or another output folder."
            )

    def _refuse_strangers(self) -> None:
        suffix = f"-of-{self.count:05d}"
        for path in self.folder.glob("*.jsonl"):
            if suffix not in path.name:
                raise ValueError(
                    f"{self.folder} holds {path.name}, which was not made by {self.count} process(es). Use the same "
                    "number of processes to resume, or another output folder."
                )
        for path in self.folder.glob(".train-*-of-*.arguments.json"):
            if suffix not in path.name:
                raise ValueError(
                    f"{self.folder} was begun by {int(path.name.split('-of-')[1][:5])} process(es), but now there "
                    f"are {self.count}. Use the same number of processes to resume, or another output folder."
                )
        if self.is_whole and not self._arguments.is_file():
            raise ValueError(
                f"{self.path} was not written by `regenerate_responses` with these arguments. Use "
                "another output folder."
            )

    def resume(self, batch_size: int) -> int:
        """Drops what an interrupted write left unfinished.

        Args:
            batch_size (`int`): Rows that [`append`] gets at a time; the last batch may be smaller.

        Returns:
            `int`: How many batches of this size are there.
        """
        if not self._part.is_file():
            return 0
        with self._part.open("r+b") as file:
            ends = [0]
            for line in file:
                if line.endswith(b"\n"):
                    ends.append(ends[-1] + len(line))
            batches = (len(ends) - 1) // batch_size
            file.truncate(ends[batches * batch_size])
        return batches

    def append(self, rows: list[dict]) -> None:
        """Adds a batch and waits until it is on the disk."""
        with self._part.open("ab") as file:
            file.write(b"".join(to_json(row) + b"\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, order: list[int]) -> None:
        """Writes the visible file, in the dataset's order.

        Args:
            order (`list[int]`): For each row that was appended, its place in the dataset.
        """
        with self._part.open("rb") as file:
            starts = [0]
            for line in file:
                starts.append(starts[-1] + len(line))
            in_dataset_order = sorted(range(len(order)), key=order.__getitem__)
            write_whole(self.path, (_line_at(file, starts[number]) for number in in_dataset_order))
        self._part.unlink()


def to_json(row: dict) -> bytes:
    """A row as JSON, on one line.

    Raises:
        ValueError: A column holds a value that JSON has no type for, such as an image.
    """
    try:
        return json.dumps(row, ensure_ascii=False).encode()
    except TypeError as error:
        columns = [name for name, value in row.items() if not _is_json(value)]
        raise ValueError(
            f"Column {', '.join(map(repr, columns))} cannot be written as JSON: {error}. Remove the column: "
            f"`dataset.remove_columns({columns})`."
        ) from error


def _is_json(value) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _line_at(file: BinaryIO, start: int) -> bytes:
    file.seek(start)
    return file.readline()
