"""What `generate(mtp=True)` was asked for: the prompt, in one form, and refusals of what could not be exact."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import (
    Cache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)

from ..base.cache import cache_name, tokens_by_layer
from ..base.rope import rope_switches
from .prefill import OWN_ARGUMENTS, Beside, read_by_base


@dataclass(frozen=True)
class Prompt:
    """What stands before the first new token.

    Args:
        unread_BT (`torch.Tensor`): What the model has not read: ids of shape `(B, T)`, or embeddings `(B, T, D)`.
        start_B (`torch.LongTensor` of shape `(B,)`): First column of each row that is no padding.
        cache ([`~transformers.Cache`] or `None`): Where `generate` would keep what the model read.
        read (`int`): Columns that this cache already holds.
        rows (`list[int]`): Which rows of the batch these are.
        ahead_B (`torch.LongTensor` of shape `(B,)`, or `(R, B)` for models of R position ids per token): How far
            positions are ahead of a count from 0 at the first token.
        beside ([`Beside`]): What the model sees beside the text.
    """

    unread_BT: torch.Tensor
    start_B: torch.LongTensor
    cache: Cache | None
    read: int
    rows: list[int]
    ahead_B: torch.LongTensor
    beside: Beside = Beside()

    @property
    def columns(self) -> int:
        """Read or not, padding included."""
        return self.read + self.unread_BT.shape[1]

    @classmethod
    def of(cls, model: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict) -> "Prompt":
        """Makes it of what `generate` prepared.

        Args:
            model ([`~transformers.PreTrainedModel`]): The base, which reads what is more than text.
            input_ids (`torch.LongTensor` of shape `(B, T)`): The text.
            model_kwargs (`dict`): All other arguments of the model.

        Raises:
            ValueError: Padding that is not all on the left, a row of nothing else, or nothing left to read.
            NotImplementedError: A prompt that the decode loop cannot go on from.
        """
        cache = model_kwargs.get(cache_name(model_kwargs))
        read = _tokens_read(cache) if getattr(cache, "_is_user_defined", False) else 0
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
        positions = model_kwargs.get("position_ids")
        ahead_B, beside = _ahead(positions, start_B, columns), Beside()
        if _is_more_than_text(model_kwargs) or not _count_up(positions, start_B, columns):
            if embeds is not None:
                raise NotImplementedError(
                    "`inputs_embeds` with `mtp=True` go alone: leave out `position_ids` and all other inputs."
                )
            if columns > read + 1:
                beside = read_by_base(model, input_ids, model_kwargs, read)
                read, unread = columns - 1, input_ids[:, -1:]
        if read and not beside.layers and set(tokens_by_layer(cache).values()) - {read}:
            raise NotImplementedError(
                "The cache that was passed holds something else than tokens (an image, say), which `mtp=True` can go "
                "on from only within one call. Leave the cache out, or decode with mtp=False."
            )
        return cls(unread, start_B, cache, read, list(range(len(start_B))), ahead_B, beside)

    def parts(self, together: bool) -> list["Prompt"]:
        """What is decoded one after the other: the whole batch, or each row without its padding.

        Args:
            together (`bool`): Whether rows can go on at different speeds.
        """
        if together or len(self.rows) == 1 and not self.start_B.any():
            return [self]
        return [
            Prompt(
                self.unread_BT[row : row + 1, start:],
                torch.zeros_like(self.start_B[:1]),
                deepcopy(self.cache),
                0,
                [row],
                self.ahead_B[..., row : row + 1],
            )
            for row, start in enumerate(self.start_B.tolist())
        ]


def _is_more_than_text(model_kwargs: dict) -> bool:
    """Whether the model is to read something beside the tokens: whatever came as data, not as a setting."""
    return any(
        name not in OWN_ARGUMENTS and isinstance(value, torch.Tensor | dict | list | tuple)
        for name, value in model_kwargs.items()
    )


def _tokens_read(cache: Cache) -> int:
    """Columns that a cache holds."""
    if not cache.layers or not all(cache.is_linear):
        return int(cache.get_seq_length())
    if cache.has_previous_state():
        raise NotImplementedError(
            "The cache that was passed holds a state, which does not say how many tokens went into it. Leave it out, "
            "or decode with mtp=False."
        )
    return 0


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


def _ahead(position_ids: torch.Tensor | None, start_B: torch.LongTensor, columns: int) -> torch.LongTensor:
    """`(B,)` or `(R, B)`: how far the next positions are ahead of a count from 0 at each row's first token."""
    if position_ids is None:
        return torch.zeros_like(start_B)
    return position_ids[..., -1].to(start_B.device) - (columns - 1 - start_B)


def _count_up(position_ids: torch.Tensor | None, start_B: torch.LongTensor, columns: int) -> bool:
    """Whether positions are those that a model counts by itself."""
    if position_ids is None:
        return True
    expected = (torch.arange(columns, device=start_B.device) - start_B[:, None])[:, -position_ids.shape[-1] :]
    given = position_ids.to(expected.device).clamp(min=0).where(expected >= 0, 0)
    return bool((given == expected.clamp(min=0)).all())


def refuse_ids(input_ids: torch.LongTensor, vocab_size: int) -> None:
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
    if kwargs.get("use_cache") is False:
        raise ValueError("`use_cache=False` with `mtp=True`: drafts are verified against a cache. Leave it out.")
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


def refuse_short_cache(cache: Cache | None, columns: int) -> None:
    """Raises if a cache of fixed size cannot hold the output.

    Args:
        cache ([`~transformers.Cache`], *optional*): What `generate` was given.
        columns (`int`): Tokens that it will hold in the end, at most.
    """
    for layer in cache.layers if getattr(cache, "_is_user_defined", False) else ():
        size = layer.get_max_length()
        if size != -1 and not layer.is_sliding and size < columns:
            raise ValueError(
                f"The cache that was passed has room for {size} tokens, but the prompt and its new tokens need "
                f"up to {columns}. Make it with max_cache_len={columns}, or lower `max_new_tokens`."
            )


def refuse_rope_switches(config: PreTrainedConfig, columns: int) -> None:
    """Raises if rotary embeddings become others on the way, which passes of a fixed shape cannot avoid to cross.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Of the model.
        columns (`int`): Tokens of the text in the end, at most.
    """
    for length in rope_switches(config.get_text_config(decoder=True)):
        if columns >= length:
            raise NotImplementedError(
                f"This model's rotary embeddings change at {length} tokens, and the text may have {columns}: passes "
                "of a fixed shape could not go on exactly. Leave out `cache_implementation` or lower `max_new_tokens`."
            )


def refuse_for_sequences(prompt: Prompt, is_static: bool, synced_gpus: bool | None, whole: bool) -> None:
    """Refuses what only models that take branches can do.

    Args:
        prompt ([`Prompt`]): The prompts.
        is_static (`bool`): Whether a static cache is asked for.
        synced_gpus (`bool`, *optional*): As passed to `generate`.
        whole (`bool`): Whether the model must read each text from its start.

    Raises:
        NotImplementedError: A static cache, or cross-attention; in a batch also a cache that holds something, or
            synchronised processes.
    """
    batch = len(prompt.rows) > 1 or bool(prompt.start_B.any())
    for asked, what, instead in (
        (is_static, "a static cache", "Leave `cache_implementation` out"),
        (prompt.beside.layers, "cross-attention to an image", "Leave the image out"),
        (whole and prompt.read, "a cache that is not empty", "Pass none"),
        (whole and prompt.unread_BT.dim() == 3, "`inputs_embeds`", "Pass `input_ids`"),
        (whole and prompt.ahead_B.any(), "`position_ids`", "Leave them out"),
        (batch and prompt.read, "a batch that goes on from a cache", "Pass one sequence at a time"),
        (batch and synced_gpus, "a batch with `synced_gpus`", "Pass one sequence at a time"),
    ):
        if asked:
            raise NotImplementedError(
                f"This model reads one plain sequence at a time, which {what} does not allow with `mtp=True`. "
                f"{instead}, or decode with mtp=False."
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
