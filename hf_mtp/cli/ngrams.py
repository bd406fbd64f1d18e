"""`hf-mtp ngrams`: the command line of [`count_ngrams`]."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .verb import verb


@verb
def ngrams(
    adapter: Annotated[Path, Argument(help="Folder of the adapter, which gets the file ngrams.safetensors.")],
    dataset: Annotated[str, Argument(help="Responses: Hub id, folder, or JSON Lines file.")],
    base: Annotated[
        str | None, Option(help="Hub id or folder of the base, if the adapter names another. For its tokenizer.")
    ] = None,
    config: Annotated[str | None, Option(help="Configuration of the dataset, if it has several.")] = None,
    split: Annotated[str, Option(help="Split of the dataset.")] = "train",
    size: Annotated[int, Option(min=1, help="Most n-grams to keep. Each takes 14 bytes.")] = 200_000,
) -> None:
    """Count the n-grams of responses, so that `auto` drafts from them as well. The output does not change.

    Use the model's own responses, such as those of hf-mtp regenerate. The file contains short pieces of them.

    Example:

        hf-mtp ngrams out own-words
    """
    from peft.utils import CONFIG_NAME

    from ..adapter.loading import read_config
    from ..adapter.ngram_table import NGRAMS_NAME
    from ..data.ngrams import count_ngrams
    from ..data.rows import load_rows
    from ..pretrained import load_tokenizer

    if not (adapter / CONFIG_NAME).is_file():
        raise ValueError(
            f"{adapter} is not the folder of an adapter: it has no {CONFIG_NAME}. Download an adapter of the Hub "
            "first: `hf download`."
        )
    tokenizer = load_tokenizer(base or str(adapter))
    table = count_ngrams(load_rows(dataset, config, split), tokenizer, size)
    table.refuse_other_base(read_config(adapter / CONFIG_NAME).get("base_vocab_size"))
    table.save(adapter)
    typer.echo(f"{adapter / NGRAMS_NAME}: {len(table)} n-grams. To see what they bring: hf-mtp evaluate {adapter}")
