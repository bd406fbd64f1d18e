"""Prompts of a suite as token ids, and those that a model cannot answer. Knows tokenizers, and nothing of decoding."""

import hashlib
import json
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ...data.prompts import encode_prompt
from .suite import SuitePrompt


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and its token ids.

    Args:
        name, domain (`str`): As in the suite.
        ids (`list[int]`): Its tokens.
    """

    name: str
    domain: str
    ids: list[int]


def tokens_fingerprint(prompts: list[EncodedPrompt]) -> str:
    """16 hexadecimal digits that change with the tokens of any prompt, as with another chat template.

    Args:
        prompts (`list[EncodedPrompt]`): The prompts.
    """
    return hashlib.sha256(json.dumps([prompt.ids for prompt in prompts]).encode()).hexdigest()[:16]


def encode_prompts(
    prompts: tuple[SuitePrompt, ...],
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    max_new_tokens: int,
) -> tuple[list[EncodedPrompt], dict[str, str]]:
    """Encodes prompts by the tokenizer's chat template, and leaves out those that the model cannot answer.

    Args:
        prompts (`tuple[SuitePrompt, ...]`): The prompts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's. Without a chat template, a conversation is
            the text of its turns.
        config ([`~transformers.PreTrainedConfig`]): The model's, for the length of its context.
        max_new_tokens (`int`): Maximum number of new tokens per answer.

    Returns:
        The prompts, and for each one that was left out the reason, by name.

    Raises:
        ValueError: No prompt can be answered.
    """
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    encoded, left_out = [], {}
    for row in prompts:
        ids = encode_prompt(_form(row.prompt, tokenizer), tokenizer)
        if not ids:
            left_out[row.name] = "The tokenizer makes no tokens of it."
        elif context is not None and len(ids) + max_new_tokens > context:
            left_out[row.name] = (
                f"{len(ids)} prompt tokens and {max_new_tokens} new tokens exceed the context of {context}."
            )
        else:
            encoded.append(EncodedPrompt(row.name, row.domain, list(ids)))
    if not encoded:
        name, reason = next(iter(left_out.items()))
        raise ValueError(
            f"None of the {len(left_out)} prompts can be answered. {name}: {reason} Use shorter prompts, or fewer new "
            "tokens (`max_new_tokens`)."
        )
    return encoded, left_out


def _form(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase) -> str | list[dict]:
    if isinstance(prompt, str) or tokenizer.chat_template is not None:
        return prompt
    return "\n\n".join(turn["content"] for turn in prompt)
