"""Datasets that cannot be trained on, told by their columns before any row is tokenized. Knows nothing of models."""

from datasets import Dataset

CHATS = ("messages", "conversations")


def refuse_rows_of_no_format(dataset, name: str, text_field: str) -> None:
    """Raises unless every row has a value in the column that the dataset is read by.

    Args:
        dataset: What is looked at if it is a [`~datasets.Dataset`]; a stream shows its rows while training.
        name (`str`): What the user calls it.
        text_field (`str`): Column of plain texts.

    Raises:
        ValueError: There is no column to learn from, or it has rows without a value, as where formats are mixed.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom" or not len(dataset):
        return  # read through a function of the user's, or refused elsewhere
    formats = [column for column in ("input_ids", "prompt", *CHATS, text_field) if column in dataset.column_names]
    if not formats:
        raise ValueError(
            f"`{name}` has the columns {', '.join(map(repr, dataset.column_names))}, and none to learn from: it needs "
            f"{text_field!r} (or set `dataset_text_field`), 'messages', 'prompt' with 'completion', or 'input_ids'. "
            "Rename one with `dataset.rename_column`, or pass `formatting_func`."
        )
    # As TRL chooses: tokens and prompts by their column, a chat by whether the first row has one.
    read = next((column for column in formats if column not in CHATS or dataset[0][column] is not None), formats[0])
    gap = first_gap(dataset, read)
    if gap is None:
        return
    others = [column for column in formats if column != read and dataset[gap][column] is not None]
    advice = (
        f"It has {others[0]!r}, but rows of one dataset are read in one format: bring them to one by `dataset.map`."
        if others
        else f"Drop such rows: `dataset.filter(lambda row: row[{read!r}] is not None)`."
    )
    raise ValueError(f"`{name}` is read by its column {read!r}, but row {gap} has none. {advice}")


def first_gap(dataset: Dataset, column: str) -> int | None:
    """The first row whose value is missing; `None` if there is none."""
    if not dataset.data.column(column).null_count:  # counted with the data, so that most need not be read
        return None
    rows = dataset.select_columns(column)
    return next((number for number, row in enumerate(rows) if row[column] is None), None)
