"""Files that are there whole or not at all."""

import pytest

from hf_mtp.base.files import sync, write_whole


def test_a_file_is_written_whole(tmp_path):
    file = tmp_path / "rows.jsonl"
    write_whole(file, (chunk for chunk in (b"one\n", b"two\n")))
    assert file.read_bytes() == b"one\ntwo\n"
    write_whole(file, [b"three\n"])
    assert file.read_bytes() == b"three\n" and list(tmp_path.iterdir()) == [file]


def test_what_fails_on_the_way_leaves_the_file_before(tmp_path):
    def broken():
        yield b"new"
        raise OSError(28, "No space left on device")

    file = tmp_path / "picture.png"
    file.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, broken())
    assert file.read_bytes() == b"old"
    assert all(path.name.startswith(".") for path in tmp_path.iterdir() if path != file)


def test_files_and_folders_reach_the_disk(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"")
    sync(file)
    sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "missing")
