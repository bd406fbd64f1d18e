"""Atomic file writes: a file appears whole or not at all, even if the writing process is killed."""

import os
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: Path, chunks: Iterable[bytes]) -> None:
    """Writes a file under a hidden name, and renames it to `path` once all of it is on the disk."""
    temporary = path.with_name(f".{path.name.lstrip('.')}.tmp")
    with temporary.open("wb") as file:
        file.writelines(chunks)
    sync(temporary)
    temporary.replace(path)


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, would survive a power failure."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
