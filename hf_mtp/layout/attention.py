"""Attention masks: which column attends to which, in the formats that attention layers accept.

Pure functions of a layout that do not depend on a model. From a config they read only the kinds of attention of its
layers (`layer_types`, `sliding_window`, `attention_chunk_size`), never its architecture.

Shapes: B batch, Q query columns, N = T + M columns of this pass, S key columns: those of this pass and those in a
cache, which are all regular and belong to one document.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .blocks import NO_DOCUMENT, BlockLayout

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class AttentionKind:
    """A kind of causal attention, which may be limited to `window` positions or to chunks of `chunk` positions."""

    name: str = "full_attention"
    window: int | None = None
    chunk: int | None = None

    def reaches_back(self) -> int | None:
        """The most positions that a token can look back; `None` if there is no limit."""
        return self.window or self.chunk


def attention_kinds(config) -> list[AttentionKind]:
    """The kinds of attention in the layers of a text decoder.

    Args:
        config ([`~transformers.PreTrainedConfig`]): The config of the decoder.
    """
    window = getattr(config, "sliding_window", None)
    by_name = {
        "sliding_attention": AttentionKind("sliding_attention", window=window),
        "chunked_attention": AttentionKind("chunked_attention", chunk=getattr(config, "attention_chunk_size", None)),
    }
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:  # one kind of layer, such as Mistral's
        layer_types = ["full_attention" if window is None else "sliding_attention"]
    return [by_name.get(name, AttentionKind(name)) for name in sorted(set(layer_types))]


@dataclass(frozen=True)
class CachedColumns:
    """The columns that a cache holds before a pass. In every row, the pass writes its own columns right after them.

    Args:
        start_B (`torch.LongTensor` of shape `(B,)`): First column that is not padding; it has position 0.
        length_B (`torch.LongTensor` of shape `(B,)`): Columns held, padding included.
        columns (`int`): S, key columns that attention gets; those past a row's own are never attended to.
        hidden_BP (`torch.BoolTensor` of shape `(B, P)`, *optional*): Which of the first P columns are never attended
            to.
    """

    start_B: torch.LongTensor
    length_B: torch.LongTensor
    columns: int
    hidden_BP: torch.BoolTensor | None = None


def allowed_attention(
    layout: BlockLayout,
    cached: CachedColumns | None = None,
    kind: AttentionKind = AttentionKind(),
    queries: int | None = None,
) -> torch.BoolTensor:
    """The attention rule.

    A regular token attends to the regular tokens of its document up to itself. A mask attends to the regular tokens of
    its anchor's document up to the anchor, and to the masks of its own block up to itself. In a tree of drafts, only
    the tokens that a draft follows are before it.

    Args:
        layout ([`BlockLayout`]): The blocks.
        cached ([`CachedColumns`], *optional*): The tokens in the cache; then all columns belong to one document.
        kind ([`AttentionKind`], *optional*): Window or chunk that the layer is limited to.
        queries (`int`, *optional*): Q, the number of last columns to return rows for; all N if `None`.

    Returns:
        `torch.BoolTensor` of shape `(B, Q, S)`; S = N without a cache.
    """
    position_BN, segment_BN, reach_BN, block_BN = (
        layout.position_BN,
        layout.segment_BN,
        layout.reach_BN,
        layout.block_BN,
    )
    column_N = torch.arange(block_BN.shape[1], device=block_BN.device)
    q = slice(0 if queries is None else len(column_N) - queries, None)
    to_regular = column_N <= reach_BN[:, q, None]
    if layout.ancestor_BTT is not None:
        to_regular = _to_ancestors(layout.ancestor_BTT, reach_BN[:, q], len(column_N))
    to_own_block = (block_BN[:, None, :] == block_BN[:, q, None]) & (column_N <= column_N[q, None])
    same_document = (segment_BN[:, None, :] == segment_BN[:, q, None]) & (segment_BN[:, None, :] > NO_DOCUMENT)
    allowed = torch.where(block_BN[:, None, :] < 0, to_regular, to_own_block) & same_document
    # Padding attends to itself, since some kernels return NaN for a query that may attend to nothing.
    allowed |= column_N == column_N[q, None]
    key_position_BS = position_BN
    if cached is not None:
        allowed, key_position_BS = _behind_cache(allowed, position_BN, cached)
    if kind.reaches_back() is not None:
        allowed &= within_reach(position_BN[:, q], key_position_BS, kind)
    return allowed


def _to_ancestors(ancestor_BTT: torch.BoolTensor, reach_BQ: torch.LongTensor, columns: int) -> torch.BoolTensor:
    """`(B, Q, columns)`: each query's last regular column and those that this column follows."""
    regular = ancestor_BTT.shape[1]
    seen_BQT = ancestor_BTT.gather(1, reach_BQ[:, :, None].expand(-1, -1, regular))
    return padded_right(seen_BQT, columns)


def _behind_cache(
    allowed_BQN: torch.BoolTensor, position_BN: torch.LongTensor, cached: CachedColumns
) -> tuple[torch.BoolTensor, torch.LongTensor]:
    """Extends the rule, `(B, Q, S)`, and the keys' positions, `(B, S)`, by the columns in the cache."""
    queries, new = allowed_BQN.shape[1:]
    column_S = torch.arange(cached.columns, device=position_BN.device)
    own_BS = column_S - cached.length_B[:, None]  # number among this pass's columns, below 0 in the cache
    is_own_BS, index_BS = (own_BS >= 0) & (own_BS < new), own_BS.clamp(0, new - 1)
    in_cache_BS = (own_BS < 0) & (column_S >= cached.start_B[:, None])
    own_BQS = allowed_BQN.gather(2, index_BS[:, None].expand(-1, queries, -1)) & is_own_BS[:, None]
    position_BS = torch.where(own_BS < 0, column_S - cached.start_B[:, None], position_BN.gather(1, index_BS))
    allowed_BQS = own_BQS | in_cache_BS[:, None]
    if cached.hidden_BP is not None and cached.hidden_BP.shape[1]:
        allowed_BQS &= ~padded_right(cached.hidden_BP, cached.columns)[:, None]
    return allowed_BQS, position_BS


def padded_right(value_xP: torch.BoolTensor, columns: int) -> torch.BoolTensor:
    """`(..., columns)`: `value_xP`, padded on the right with `False`."""
    return torch.nn.functional.pad(value_xP, (0, columns - value_xP.shape[-1]))


def within_reach(query_BQ: torch.LongTensor, key_BS: torch.LongTensor, kind: AttentionKind) -> torch.BoolTensor:
    """`(B, Q, S)`: whether the key's position is within the window, or in the chunk, of the query's position."""
    query, key = query_BQ[:, :, None], key_BS[:, None, :]
    if kind.window is not None:
        return query - key < kind.window
    return query // kind.chunk == key // kind.chunk


def additive(allowed_BQS: torch.BoolTensor, dtype: torch.dtype) -> torch.Tensor:
    """`(B, 1, Q, S)`: 0 where attention is allowed, and the lowest number of `dtype` elsewhere."""
    mask = torch.zeros(allowed_BQS.shape, dtype=dtype, device=allowed_BQS.device)
    return mask.masked_fill_(~allowed_BQS, torch.finfo(dtype).min)[:, None]


def in_blocks(allowed_BQS: torch.BoolTensor) -> "BlockMask":
    """The mask for flex attention, which skips blocks of columns where nothing is allowed."""
    from torch.nn.attention.flex_attention import create_block_mask  # missing in the oldest supported torch

    def allows(row, head, query, key):
        return allowed_BQS[row, query, key]

    rows, queries, keys = allowed_BQS.shape
    return create_block_mask(allows, rows, None, queries, keys, device=allowed_BQS.device)


def attention_masks(
    layout: BlockLayout,
    kinds: list[AttentionKind],
    form: Callable[[torch.BoolTensor], "torch.Tensor | BlockMask"],
    cached: CachedColumns | None = None,
    queries: int | None = None,
) -> "torch.Tensor | BlockMask | dict[str, torch.Tensor | BlockMask]":
    """The `attention_mask` of a model's forward pass.

    Args:
        layout, cached, queries: As in [`allowed_attention`].
        kinds (`list[AttentionKind]`): See [`attention_kinds`].
        form (`Callable`): [`additive`] or [`in_blocks`], whichever the attention layers accept.

    Returns:
        One mask of shape `(B, 1, Q, S)` if all layers are of one kind or no window or chunk can be exceeded. Otherwise
        one mask per kind, under transformers' name of the kind.
    """
    # An upper bound of all positions: a mask is at most M positions after its anchor.
    longest = cached.columns if cached is not None else layout.position_BT.shape[1] + layout.masks
    limited = [kind for kind in kinds if kind.reaches_back() is not None and kind.reaches_back() < longest]
    if not limited:
        return form(allowed_attention(layout, cached, queries=queries))
    masks = {kind.name: form(allowed_attention(layout, cached, kind, queries)) for kind in kinds}
    return masks if len(masks) > 1 else masks[kinds[0].name]
