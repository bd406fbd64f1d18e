"""Loads the rows of a dataset by Hub id, folder or file."""

from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError


def load_rows(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """Loads a dataset from the Hub, from a folder of `save_to_disk`, or from a JSON Lines file.

    Args:
        name (`str`): Hub id, folder or file.
        config (`str`, *optional*): Configuration of the dataset, if it has several.
        split (`str`, *optional*, defaults to `"train"`): Its split. A file has one only.

    Raises:
        ValueError: The file is empty, or is not JSON Lines.
        FileNotFoundError, ConnectionError: There is no such dataset, or the Hub cannot be reached.
    """
    path = Path(name)
    if path.is_file():
        return _rows_of_file(path)
    if path.suffix in (".json", ".jsonl") and not path.exists():  # the Hub would be asked for a dataset of this name
        raise FileNotFoundError(f"There is no file {name}. Pass a JSON Lines file, a folder, or the id of a dataset.")
    if (path / "state.json").is_file():
        return load_from_disk(name)
    if (path / "dataset_dict.json").is_file():
        return load_from_disk(name)[split]
    return load_dataset(name, config, split=split)


def _rows_of_file(path: Path) -> Dataset:
    try:
        return load_dataset("json", data_files=str(path), split="train")
    except StopIteration as error:
        raise ValueError(f"{path} is empty. It needs one JSON object on each line.") from error
    except DatasetGenerationError as error:
        raise ValueError(
            f"{path} is not JSON Lines: {error.__cause__ or error}. It needs one JSON object on each line."
        ) from error
