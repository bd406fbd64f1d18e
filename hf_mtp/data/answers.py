"""Generates the model's own responses for a batch of prompts."""

from typing import NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.inspection import input_device
from ..base.padding import end_tokens, left_padded
from .prompts import decode_response, encode_prompt, question_of

STOP, LENGTH = "stop", "length"  # finish_reason, in the words of serving engines


class Answer(NamedTuple):
    """A row with the model's response, and the length of the response in tokens."""

    row: dict
    tokens: int


def answer_batch(
    rows: list[dict],
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokens: int | None,
    mtp: bool,
    options: dict,
) -> list[Answer]:
    """A batch of rows with the model's responses.

    Args:
        rows (`list[dict]`): The rows.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model that answers.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        prompt_tokens (`int`, *optional*): How many tokens of a plain text are the prompt.
        mtp (`bool`): Whether to use multi-token prediction.
        options (`dict`): Arguments of `generate`: `eos_token_id`, a list, `pad_token_id`, `max_new_tokens` and others.
    """
    questions = [question_of(row, tokenizer, prompt_tokens) for row in rows]
    prompts = [encode_prompt(question.prompt, tokenizer, row) for question, row in zip(questions, rows, strict=True)]
    input_ids_BT, mask_BT = left_padded(prompts, options["pad_token_id"])
    device = input_device(model)
    output_BN = model.generate(
        input_ids=input_ids_BT.to(device),
        attention_mask=mask_BT.to(device),
        **options,
        **({"mtp": True} if mtp else {}),
    )
    answers = []
    new_ids_B = output_BN[:, input_ids_BT.shape[1] :].tolist()
    for question, prompt, new_ids in zip(questions, prompts, new_ids_B, strict=True):
        response, finish_reason = _until_end(new_ids, options)
        row = question.with_response(decode_response(prompt, response, tokenizer))
        answers.append(Answer({**row, "finish_reason": finish_reason}, len(response)))
    return answers


def _until_end(ids: list[int], options: dict) -> tuple[list[int], str]:
    """A response without its end token and the padding behind it, and why it ended."""
    for place, token in enumerate(ids):
        if token in (options["eos_token_id"] or ()):
            return ids[:place], STOP
    end = len(ids)
    while end and ids[end - 1] == options["pad_token_id"]:  # ended by a stopping criterion, such as a stop string
        end -= 1
    return ids[:end], LENGTH if end == options["max_new_tokens"] else STOP


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def chosen_end_tokens(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, asked_for: int | list[int] | None
) -> list[int] | None:
    """The `eos_token_id` to generate with: what was asked for, else the model's own, else the tokenizer's.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model that answers.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        asked_for (`int` or `list[int]`, *optional*): As in `generate`.
    """
    if asked_for is not None:
        return [asked_for] if isinstance(asked_for, int) else [*asked_for]
    if tokenizer.eos_token_id is None:
        return end_tokens(model) or None
    return end_tokens(model) or [tokenizer.eos_token_id]
