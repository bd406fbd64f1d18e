"""Padding: before the shorter prompts of a batch, and behind the answers that end first."""

from collections.abc import Container, Sequence

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Token ids `(B, T)` of prompts, padded on the left as `generate` wants them, and their attention mask.

    Args:
        prompts (`Sequence[Sequence[int]]`): Token ids of each row.
        pad (`int`): The padding token.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + [*prompt] for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def end_tokens(model: PreTrainedModel | PeftModel, config: GenerationConfig | None = None) -> list[int]:
    """The token ids that end an answer by a generation config; an empty list if none names any.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model. Its own config counts last.
        config ([`~transformers.GenerationConfig`], *optional*): The config of a call.
    """
    asked_for = None if config is None else config.eos_token_id
    ends = model.generation_config.eos_token_id if asked_for is None else asked_for
    return [] if ends is None else [ends] if isinstance(ends, int) else [*ends]


def up_to_end(ids: list[int], ends: Container[int]) -> list[int]:
    """Token ids up to the first end token, that included. What follows in a batch is padding.

    Args:
        ids (`list[int]`): New tokens of a row.
        ends (`Container[int]`): Token ids that end an answer.
    """
    place = next((index for index, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: place + 1]
