"""The prompt of a call, whether it came as ids, embeddings, a filled cache or with images.

Shapes: B batch, T tokens that the model has not read, E embedding size.
"""

import inspect
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel

from ..base.caches import cache_name, copied, tokens_by_layer
from ..cache.protocol import DecodingCache
from .prefill import OWN_ARGUMENTS, ExtraInputs, read_by_base


@dataclass(frozen=True)
class Prompt:
    """All that comes before the first new token.

    Args:
        unread_BT (`torch.Tensor`): Tokens that the model has not read: ids of shape `(B, T)`, or embeddings of shape
            `(B, T, E)`.
        start_B (`torch.LongTensor` of shape `(B,)`): First column of each row that is not padding.
        cache ([`~transformers.Cache`] or `None`): The cache that was passed to `generate`, or that it created.
        read (`int`): Columns that this cache already holds.
        rows (`list[int]`): Numbers of these rows in the batch.
        offset_B (`torch.LongTensor` of shape `(B,)`, or `(R, B)` for models with R position ids per token): How far
            positions are ahead of a count from 0 at the first token.
        hidden_BP (`torch.BoolTensor` of shape `(B, P)`, or `(B, 0)`): Columns after each row's first token that the
            attention mask hides.
        extra ([`ExtraInputs`]): What the model uses besides the text.
    """

    unread_BT: torch.Tensor
    start_B: torch.LongTensor
    cache: Cache | None
    read: int
    rows: list[int]
    offset_B: torch.LongTensor
    hidden_BP: torch.BoolTensor
    extra: ExtraInputs = ExtraInputs()

    @property
    def columns(self) -> int:
        """All columns, read or not, padding included."""
        return self.read + self.unread_BT.shape[1]

    @classmethod
    def of(
        cls, model: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict, mask_length: int | None = None
    ) -> "Prompt":
        """Creates a prompt from the arguments that `generate` prepared.

        Args:
            model ([`~transformers.PreTrainedModel`]): The base, which reads everything other than text.
            input_ids (`torch.LongTensor` of shape `(B, T)`): The text.
            model_kwargs (`dict`): All other arguments of the model.
            mask_length (`int`, *optional*): Length of an attention mask of ones, if `generate` left it out.

        Raises:
            ValueError: A row is all padding, the attention mask has another length, or no token is left to read.
            NotImplementedError: The decode loop cannot continue the prompt.
        """
        cache, embeds = model_kwargs.get(cache_name(model_kwargs)), model_kwargs.get("inputs_embeds")
        read = 0 if cache is None else _tokens_read(cache)
        mask = model_kwargs.get("attention_mask")
        unread = _unread(input_ids, embeds, mask, mask_length, read)
        columns, rows = read + unread.shape[1], list(range(len(input_ids)))
        _check_mask(mask_length if mask is None else mask.shape[1], columns)
        start_B, hidden_BP = _padding(mask, len(rows), columns, unread.device)
        positions, extra = _positions(model, input_ids, model_kwargs, columns), ExtraInputs()
        model_kwargs = {**model_kwargs, "position_ids": positions}
        is_text = not _is_more_than_text(model_kwargs) and _count_up(positions, start_B, columns)
        if not is_text and columns > read + 1:
            extra = read_by_base(model, input_ids, model_kwargs, columns, read)
            read, unread = columns - 1, unread[:, -1:]
        if read and not extra.layers and set(tokens_by_layer(cache).values()) - {read}:
            raise NotImplementedError(
                "The cache that was passed contains more than tokens, such as an image, which `mtp=True` supports "
                "only within a single call. Leave out the cache, or decode with mtp=False."
            )
        offset_B = _position_offset(positions, start_B, columns)
        return cls(unread, start_B, cache, read, rows, offset_B, hidden_BP, extra)

    def fill(self, cache: DecodingCache) -> None:
        """Gives an empty cache the tokens that were read, and all else that comes before the next token.

        Args:
            cache ([`DecodingCache`]): A cache of these rows.
        """
        cache.rows.set_position_offset(self.offset_B)
        cache.rows.hidden_BP = self.hidden_BP
        if self.read:
            cache.adopt(self.cache)
        if self.extra.layers or self.extra.inputs:  # other kinds of caches were rejected before
            cache.share_layers(self.cache, self.extra.layers, self.extra.inputs)

    def parts(self, together: bool) -> list["Prompt"]:
        """The prompts to decode one after the other: the whole batch, or each row without its padding.

        Args:
            together (`bool`): Whether rows can advance at different speeds.
        """
        if together or len(self.rows) == 1 and not self.start_B.any():
            return [self]
        return [
            Prompt(
                self.unread_BT[row : row + 1, start:],
                torch.zeros_like(self.start_B[:1]),
                copied(self.cache),
                0,
                [row],
                self.offset_B[..., row : row + 1],
                self.hidden_BP[row : row + 1],
            )
            for row, start in enumerate(self.start_B.tolist())
        ]


def _unread(
    input_ids: torch.LongTensor, embeds: torch.Tensor | None, mask: torch.Tensor | None, ones: int | None, read: int
) -> torch.Tensor:
    """The tokens that the model has not read. `ones` is the length of a mask that was left out."""
    length = mask.shape[1] if mask is not None else ones or input_ids.shape[1]
    # The user may pass only the new tokens, with a mask over all tokens.
    is_new_only = embeds is None and read > 0 and length == read + input_ids.shape[1]
    unread = (input_ids if embeds is None else embeds)[:, 0 if is_new_only else read :]
    if not unread.shape[1] and not read:
        raise ValueError("The prompt is empty. Start it with the tokenizer's bos token.")
    if not unread.shape[1]:
        raise ValueError(
            f"The cache that was passed already contains {read} tokens, and the prompt has {input_ids.shape[1]}. Pass "
            "the whole text, with at least one more token than the cache; or the new tokens alone, with an attention "
            "mask over the whole text."
        )
    return unread


def _is_more_than_text(model_kwargs: dict) -> bool:
    """Whether the model gets data besides the tokens. Settings, and what says that there is no image, do not count."""
    others = {name: value for name, value in model_kwargs.items() if name not in OWN_ARGUMENTS}
    kinds = others.pop("mm_token_type_ids", None)  # 0 for text
    if kinds is not None and kinds.any():
        return True
    return any(
        isinstance(value, torch.Tensor) or (isinstance(value, dict | list | tuple) and len(value) > 0)
        for value in others.values()
    )


def _tokens_read(cache: Cache) -> int:
    """Number of columns that a cache holds."""
    is_known = isinstance(cache, Cache)
    if is_known and not (cache.layers and all(cache.is_linear)):
        return int(cache.get_seq_length())
    if not is_known or cache.has_previous_state():
        raise NotImplementedError(
            "The cache that was passed contains a recurrent state, whose number of tokens is unknown. Leave out the "
            "cache, or decode with mtp=False."
        )
    return 0


def _check_mask(length: int | None, columns: int) -> None:
    if length not in (None, columns):
        raise ValueError(
            f"`attention_mask` has {length} columns, but the prompt and the tokens of a cache that was passed have "
            f"{columns}. Pass the mask that the tokenizer returned with these ids."
        )


def _padding(
    mask: torch.Tensor | None, batch: int, columns: int, device: torch.device
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """`(B,)`: columns of padding at the left of each row; `(B, columns)`, or `(B, 0)`: other hidden columns."""
    if mask is None:
        mask = torch.ones(batch, columns, device=device)
    mask_BP = mask.bool().to(device)
    if not mask_BP.any(dim=1).all():
        row = int((~mask_BP.any(dim=1)).nonzero()[0])
        raise ValueError(
            f"Row {row} of the batch contains only padding, so there is nothing to continue. Remove the row, or "
            "start it with the tokenizer's bos token."
        )
    start_B = mask_BP.long().argmax(dim=1)
    hidden_BP = ~mask_BP & (torch.arange(mask_BP.shape[1], device=device) > start_B[:, None])
    return start_B, hidden_BP if hidden_BP.any() else hidden_BP[:, :0]


def _positions(
    model: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict, columns: int
) -> torch.LongTensor | None:
    """The position ids of the prompt. Some models drop those of `generate`, and count columns, padding included."""
    given = model_kwargs.get("position_ids")
    if given is None or "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    counted = torch.arange(columns, device=given.device)[-given.shape[-1] :]
    if bool((given == counted).all()):
        return given
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    is_dropped = "position_ids" in inputs and inputs["position_ids"] is None
    return counted.expand(len(input_ids), -1) if is_dropped else given


def _position_offset(position_ids: torch.Tensor | None, start_B: torch.LongTensor, columns: int) -> torch.LongTensor:
    """`(B,)` or `(R, B)`: how far the next positions are ahead of a count from 0 at each row's first token."""
    if position_ids is None:
        return torch.zeros_like(start_B)
    return position_ids[..., -1].to(start_B.device) - (columns - 1 - start_B)


def _count_up(position_ids: torch.Tensor | None, start_B: torch.LongTensor, columns: int) -> bool:
    """Whether position ids are those that the model would count itself."""
    if position_ids is None:
        return True
    expected = (torch.arange(columns, device=start_B.device) - start_B[:, None])[:, -position_ids.shape[-1] :]
    given = position_ids.to(expected.device).clamp(min=0).where(expected >= 0, 0)
    return bool((given == expected.clamp(min=0)).all())
