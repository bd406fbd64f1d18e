"""The prompt of a dataset row, and the row with a new response, for every TRL dataset format that has a prompt."""

import json
from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from trl import maybe_convert_to_chatml

FORMS = ("prompt", "messages", "conversations", "text")  # in the order in which TRL looks for them

TextOrTurns = str | list[dict]  # a text, or the turns of a conversation


class Question(NamedTuple):
    """A prompt, and a function that makes a row of a response to it.

    Args:
        prompt (`str` or `list[dict]`): Text, or the turns of a conversation.
        with_response (`Callable`): Takes a response and returns the row with it.
    """

    prompt: TextOrTurns
    with_response: Callable[[str], dict]


def form_of(columns: list[str]) -> str:
    """Which of [`FORMS`] a dataset has.

    Raises:
        ValueError: There is no column to take a prompt from.
    """
    for form in FORMS:
        if form in columns:
            return form
    raise ValueError(
        f"The dataset needs a column with prompts, one of {', '.join(map(repr, FORMS))}, but it has "
        f"{', '.join(map(repr, columns)) or 'no columns'}. Rename the column: `dataset.rename_column(..., 'prompt')`."
    )


def question_of(row: dict, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int | None = None) -> Question:
    """Separates the prompt of a row from its response.

    Args:
        row (`dict`): A row in one of [`FORMS`]. The prompt of a conversation is all turns before a final one
            of the assistant.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        prompt_tokens (`int`, *optional*): How many tokens of a plain text are the prompt.
    """
    form = form_of([*row])
    # TRL could take columns of other forms, which have the old response.
    row = maybe_convert_to_chatml({name: value for name, value in row.items() if name == form or name not in FORMS})
    if form == "prompt":
        if isinstance(row["prompt"], str):
            return Question(row["prompt"], lambda response: {**row, "completion": response})
        return Question(row["prompt"], lambda response: {**row, "completion": [_turn(response)]})
    if form == "text":
        start = _first_tokens(row["text"], tokenizer, prompt_tokens)
        return Question(start, lambda response: {**row, "text": start + response})
    turns = row["messages"]
    asked = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    return Question(asked, lambda response: {**row, "messages": [*asked, _turn(response)]})


def _turn(response: str) -> dict:
    return {"role": "assistant", "content": response}


def _first_tokens(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    """The first tokens of a text. A character that the cut would split is left out."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= count else _decode(ids[:count], tokenizer).rstrip("\ufffd")


def encode_prompt(
    prompt: TextOrTurns,
    tokenizer: PreTrainedTokenizerBase,
    row: dict | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a prompt as TRL tokenizes it; an empty list for an empty prompt.

    Args:
        prompt (`str` or `list[dict]`): Text, or the turns of a conversation.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        row (`dict`, *optional*): The row it is from, for its `tools`, a list or its JSON, and `chat_template_kwargs`.
        add_generation_prompt (`bool`, *optional*, defaults to `True`): Whether a response follows the turns of a
            conversation. `False` if they contain it.
    """
    if not prompt:
        return []
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    row = row or {}
    tools = row.get("tools")
    encoded = tokenizer.apply_chat_template(
        prompt,
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=True,
        tools=(json.loads(tools or "null") if isinstance(tools, str) else tools) or None,
        **(row.get("chat_template_kwargs") or {}),
    )
    return encoded["input_ids"]


def decode_response(prompt_ids: list[int], response_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that stands behind the prompt. Decoded alone, a response may lose the space that it starts with."""
    return _decode(prompt_ids + response_ids, tokenizer)[len(_decode(prompt_ids, tokenizer)) :]


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
