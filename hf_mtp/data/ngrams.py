"""[`count_ngrams`] makes an adapter's n-gram table from the responses of a dataset."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase
from trl import maybe_convert_to_chatml

from ..adapter.ngram_table import NgramTable
from .ngram_counts import count_tokens
from .prompts import encode_prompt, form_of, question_of


def count_ngrams(dataset: Iterable[dict], tokenizer: PreTrainedTokenizerBase, size: int = 200_000) -> NgramTable:
    """Counts which tokens most often follow the last one, two or three tokens in the responses of a dataset.

    `mtp_strategy="auto"` drafts from the table wherever that pays. It works best with the model's own responses, such
    as those of [`regenerate_responses`]. The output never changes. The table contains short pieces of the responses,
    so do not publish it if they are private.

    Args:
        dataset (`Iterable[dict]`): Rows with a response, in any of TRL's forms: `prompt` and `completion`, `messages`
            (or `conversations`), or plain `text`, which counts as a whole.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        size (`int`, *optional*, defaults to 200000): Most contexts; of more, the most frequent are kept. A context
            takes 26 bytes.

    Raises:
        ValueError: A row has no response, the vocabulary is larger than a million tokens, or no n-gram occurs twice.

    Example:

    ```python
    >>> from hf_mtp import count_ngrams

    >>> model.active_peft_config.ngrams = count_ngrams(dataset, tokenizer)
    >>> model.save_pretrained("my-model-mtp")  # writes ngrams.safetensors, too
    ```
    """
    return count_tokens((_response_ids(row, tokenizer) for row in dataset), size)


def _response_ids(row: dict, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a row's last response, and of its end, as the model would write them."""
    if form_of([*row]) == "text":
        return _to_end(tokenizer(row["text"])["input_ids"], tokenizer)
    prompt = question_of(row, tokenizer).prompt
    row = maybe_convert_to_chatml(row)
    turns = row.get("completion")
    if turns is None:
        turns = (row.get("messages") or [])[len(prompt) :]
    if turns == []:
        raise ValueError(
            "The dataset has a prompt without a response, but an n-gram table is counted from responses. Let the "
            "model answer first: `hf-mtp regenerate`."
        )
    if isinstance(turns, str):
        return _to_end(tokenizer(turns, add_special_tokens=False)["input_ids"], tokenizer)
    before = encode_prompt(prompt, tokenizer, row)
    whole = encode_prompt([*prompt, *turns], tokenizer, row, add_generation_prompt=False)
    return whole[len(before) :] if whole[: len(before)] == before else whole


def _to_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids with the end of a text, if the tokenizer has one and did not add it."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
