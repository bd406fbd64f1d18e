"""What `generate(mtp=True)` was asked for: the prompt, in one form, and refusals of what could not be exact."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import Cache, GenerationConfig, StoppingCriteriaList, StopStringCriteria

from .cache import CACHE_NAMES, cache_name

# Arguments of a model's forward pass that the decode loop makes itself.
_OWN_ARGUMENTS = {
    "attention_mask",
    "position_ids",
    *CACHE_NAMES,
    "inputs_embeds",
    "use_cache",
    "logits_to_keep",
    "cache_position",
    "output_hidden_states",
    "output_attentions",
}


@dataclass(frozen=True)
class Prompt:
    """What stands before the first new token.

    Args:
        unread_BT (`torch.Tensor`): What the model has not read: ids of shape `(B, T)`, or embeddings `(B, T, D)`.
        start_B (`torch.LongTensor` of shape `(B,)`): First column of each row that is no padding.
        cache ([`~transformers.Cache`] or `None`): Where `generate` would keep what the model read.
        read (`int`): Columns that this cache already holds.
    """

    unread_BT: torch.Tensor
    start_B: torch.LongTensor
    cache: Cache | None
    read: int

    @classmethod
    def of(cls, input_ids: torch.LongTensor, model_kwargs: dict) -> "Prompt":
        """Makes it of what `generate` prepared.

        Raises:
            ValueError: Padding that is not all on the left, a row of nothing else, or nothing left to read.
            NotImplementedError: Arguments for the model that the decode loop does not know.
        """
        unknown = [
            name
            for name, value in model_kwargs.items()
            if name not in _OWN_ARGUMENTS and isinstance(value, torch.Tensor)
        ]
        if unknown:
            raise NotImplementedError(
                f"`mtp=True` decodes text: the model's argument(s) {', '.join(map(repr, unknown))} are not passed on. "
                "Leave them out, or decode with mtp=False."
            )
        cache = model_kwargs.get(cache_name(model_kwargs))
        read = cache.get_seq_length() if getattr(cache, "_is_user_defined", False) else 0
        read = int(read)
        embeds = model_kwargs.get("inputs_embeds")
        if embeds is not None and read:
            raise NotImplementedError("`inputs_embeds` together with a cache: pass one of them.")
        unread = embeds if embeds is not None else input_ids[:, read:]
        columns = read + unread.shape[1]
        if not unread.shape[1]:
            raise ValueError(
                f"The cache that was passed holds all {read} tokens of the prompt: nothing is left to read. Pass "
                "the prompt with at least one token more than the cache holds."
            )
        start_B = _left_padding(model_kwargs.get("attention_mask"), input_ids.shape[0], columns, unread.device)
        _refuse_positions(model_kwargs.get("position_ids"), start_B, columns)
        return cls(unread, start_B, cache, read)


def _left_padding(mask: torch.Tensor | None, batch: int, columns: int, device: torch.device) -> torch.LongTensor:
    """`(B,)`: columns of padding at the left of each row."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    mask_BS = mask[:, :columns].bool().to(device)
    if not mask_BS.any(dim=1).all():
        row = int((~mask_BS.any(dim=1)).nonzero()[0])
        raise ValueError(
            f"Row {row} of the batch is all padding, so there is nothing to continue. Leave it out, or start it with "
            "the tokenizer's bos token."
        )
    if not mask_BS[:, -1].all() or (mask_BS[:, :-1] & ~mask_BS[:, 1:]).any():
        raise ValueError(
            "The batch has padding behind or between its tokens, but new tokens go behind the last column. Pad on the "
            "left: tokenizer.padding_side = 'left'."
        )
    return mask_BS.long().argmax(dim=1)


def _refuse_positions(position_ids: torch.Tensor | None, start_B: torch.LongTensor, columns: int) -> None:
    if position_ids is None:
        return
    expected = (torch.arange(columns, device=start_B.device) - start_B[:, None])[:, -position_ids.shape[-1] :]
    if position_ids.dim() != 2 or not torch.equal(
        position_ids.to(expected.device).clamp(min=0).where(expected >= 0, 0), expected.clamp(min=0)
    ):
        raise NotImplementedError(
            "`position_ids` with `mtp=True` must count up from 0 at each row's first token, as they do when left out."
        )


def refuse_prompt(prompt: Prompt, input_ids: torch.LongTensor, vocab_size: int) -> None:
    """Raises for token ids that the base does not have."""
    if input_ids.numel() and (input_ids.min() < 0 or input_ids.max() >= vocab_size):
        raise ValueError(
            f"The prompt has token ids from {input_ids.min().item()} to {input_ids.max().item()}, but the vocabulary "
            f"has ids 0 to {vocab_size - 1}. Was it tokenized with this model's own tokenizer?"
        )


def refuse_arguments(kwargs: dict) -> None:
    """Refuses arguments that `generate` would use up before the decode loop could see them."""
    if kwargs.get("custom_generate") is not None:
        raise ValueError("`custom_generate` and `mtp=True` are two ways to decode: pass one of them.")
    if kwargs.get("assistant_model") is not None:
        raise ValueError("`assistant_model` and `mtp=True` are two ways to make drafts: pass one of them.")
    _refuse_quantized(kwargs.get("cache_implementation"))  # before the packages for it are asked for


def _refuse_quantized(cache_implementation: str | None) -> None:
    if cache_implementation == "quantized":
        raise ValueError(
            "cache_implementation='quantized' rounds keys and values a group of tokens at a time, and which tokens "
            "form a group depends on how many are decoded per pass, so `mtp=True` could not return the same output. "
            "Use 'dynamic', 'static' or 'offloaded'."
        )


def refuse_generation_config(config: GenerationConfig) -> None:
    """Refuses modes by the final configuration, whether they come from the call or from the model's defaults."""
    inexact = {
        "num_beams": (config.num_beams or 1) > 1,
        "penalty_alpha": bool(config.penalty_alpha),
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        "guidance_scale": (config.guidance_scale or 1) != 1,
    }
    for name, asked in inexact.items():
        if asked:
            raise ValueError(
                f"`{name}={getattr(config, name)}` does not decode one sequence token by token, so `mtp=True` could "
                f"not return the same output. Drop `{name}`, or `mtp=True`."
            )
    _refuse_quantized(config.cache_implementation)
    if not config.use_cache:
        raise ValueError("`use_cache=False` with `mtp=True`: drafts are verified against a cache. Leave it out.")


def refuse_short_cache(cache: Cache | None, columns: int) -> None:
    """Raises if a cache of fixed size cannot hold the output.

    Args:
        cache ([`~transformers.Cache`], *optional*): What `generate` was given.
        columns (`int`): Tokens that it will hold in the end, at most.
    """
    for layer in getattr(cache, "layers", []):
        size = layer.get_max_length()
        if size != -1 and not layer.is_sliding and size < columns:
            raise ValueError(
                f"The cache that was passed has room for {size} tokens, but the prompt and its new tokens need "
                f"up to {columns}. Make it with max_cache_len={columns}, or lower `max_new_tokens`."
            )


def stop_strings_to_criteria(kwargs: dict) -> None:
    """Turns `stop_strings` and `tokenizer` into the criterion that transformers would make of them."""
    tokenizer, config = kwargs.pop("tokenizer", None), kwargs.get("generation_config")
    stop_strings = kwargs.get("stop_strings") or getattr(config, "stop_strings", None)
    if tokenizer is None or stop_strings is None:
        return
    kwargs.pop("stop_strings", None)
    if config is not None:
        kwargs["generation_config"] = deepcopy(config)
        kwargs["generation_config"].stop_strings = None
    criterion = StopStringCriteria(tokenizer, stop_strings)
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), criterion])
