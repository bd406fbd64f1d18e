"""The prompt of a call, in one form.

Shapes: B batch, T tokens that the model has not read, E embedding size.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel

from ..base.caches import cache_name, tokens_by_layer
from .prefill import OWN_ARGUMENTS, ExtraInputs, read_by_base


@dataclass(frozen=True)
class Prompt:
    """What stands before the first new token.

    Args:
        unread_BT (`torch.Tensor`): What the model has not read: ids of shape `(B, T)`, or embeddings `(B, T, D)`.
        start_B (`torch.LongTensor` of shape `(B,)`): First column of each row that is no padding.
        cache ([`~transformers.Cache`] or `None`): Where `generate` would keep what the model read.
        read (`int`): Columns that this cache already holds.
        rows (`list[int]`): Which rows of the batch these are.
        offset_B (`torch.LongTensor` of shape `(B,)`, or `(R, B)` for models of R position ids per token): How far
            positions are ahead of a count from 0 at the first token.
        extra ([`ExtraInputs`]): What the model sees beside the text.
    """

    unread_BT: torch.Tensor
    start_B: torch.LongTensor
    cache: Cache | None
    read: int
    rows: list[int]
    offset_B: torch.LongTensor
    extra: ExtraInputs = ExtraInputs()

    @property
    def columns(self) -> int:
        """Read or not, padding included."""
        return self.read + self.unread_BT.shape[1]

    @property
    def padding(self) -> list[int]:
        """Columns of padding at the left of each row."""
        return self.start_B.tolist()

    @classmethod
    def of(
        cls, model: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict, mask_length: int | None = None
    ) -> "Prompt":
        """Makes it of what `generate` prepared.

        Args:
            model ([`~transformers.PreTrainedModel`]): The base, which reads what is more than text.
            input_ids (`torch.LongTensor` of shape `(B, T)`): The text.
            model_kwargs (`dict`): All other arguments of the model.
            mask_length (`int`, *optional*): Columns of an attention mask of ones, which `generate` leaves out.

        Raises:
            ValueError: Padding that is not all on the left, a row of nothing else, or nothing left to read.
            NotImplementedError: A prompt that the decode loop cannot go on from.
        """
        cache = model_kwargs.get(cache_name(model_kwargs))
        read = _tokens_read(cache) if getattr(cache, "_is_user_defined", False) else 0
        embeds = model_kwargs.get("inputs_embeds")
        if embeds is not None and read:
            raise NotImplementedError("`inputs_embeds` together with a cache: pass one of them.")
        mask = model_kwargs.get("attention_mask")
        length = mask.shape[1] if mask is not None else mask_length or input_ids.shape[1]
        # The new tokens may come alone, with the mask of all.
        is_new_only = read > 0 and length == read + input_ids.shape[1]
        unread = embeds if embeds is not None else input_ids[:, 0 if is_new_only else read :]
        columns = read + unread.shape[1]
        if not unread.shape[1]:
            raise ValueError(
                f"The cache that was passed holds all {read} tokens of the prompt: nothing is left to read. Pass "
                "the prompt with at least one token more than the cache holds."
            )
        start_B = _left_padding(model_kwargs.get("attention_mask"), input_ids.shape[0], columns, unread.device)
        positions = model_kwargs.get("position_ids")
        offset_B, extra = _position_offset(positions, start_B, columns), ExtraInputs()
        if _is_more_than_text(model_kwargs) or not _count_up(positions, start_B, columns):
            if embeds is not None:
                raise NotImplementedError(
                    "`inputs_embeds` with `mtp=True` go alone: leave out `position_ids` and all other inputs."
                )
            if columns > read + 1:
                extra = read_by_base(model, input_ids, model_kwargs, read)
                read, unread = columns - 1, input_ids[:, -1:]
        if read and not extra.layers and set(tokens_by_layer(cache).values()) - {read}:
            raise NotImplementedError(
                "The cache that was passed holds something else than tokens (an image, say), which `mtp=True` can go "
                "on from only within one call. Leave the cache out, or decode with mtp=False."
            )
        return cls(unread, start_B, cache, read, list(range(len(start_B))), offset_B, extra)

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
                self.offset_B[..., row : row + 1],
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


def _position_offset(position_ids: torch.Tensor | None, start_B: torch.LongTensor, columns: int) -> torch.LongTensor:
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
