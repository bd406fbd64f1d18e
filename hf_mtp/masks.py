"""Who attends to whom, as the additive masks that attention layers take.

Pure functions of a layout. Knows nothing of models; of a model's config it reads only which kinds of attention its
layers have (`layer_types`, `sliding_window`, `attention_chunk_size`), never its architecture.

Shapes: B batch, Q query columns, P cached columns (all regular), N = T + M columns of this pass, S = P + N keys.
"""

from dataclasses import dataclass

import torch

from .layout import BlockLayout


@dataclass(frozen=True)
class AttentionKind:
    """One kind of attention layer: causal, within `window` positions or within chunks of `chunk` positions."""

    name: str = "full_attention"
    window: int | None = None
    chunk: int | None = None

    def reaches_back(self) -> int | None:
        """How many positions a token can look back at most; `None` without limit."""
        return self.window or self.chunk


def attention_kinds(config) -> list[AttentionKind]:
    """The kinds of attention that a model's layers have.

    Args:
        config ([`~transformers.PreTrainedConfig`]): The configuration of the text decoder.
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


def allowed_attention(
    layout: BlockLayout, past: int = 0, kind: AttentionKind = AttentionKind(), queries: int | None = None
) -> torch.BoolTensor:
    """The attention rule.

    A regular token attends to the regular tokens of its document up to itself. A mask attends to the regular tokens of
    its anchor's document up to the anchor, and to the masks of its own block up to itself.

    Args:
        layout ([`BlockLayout`]): The blocks.
        past (`int`, *optional*, defaults to 0): P, regular tokens in the cache, at positions 0..P-1. If not 0, all
            columns belong to one document.
        kind ([`AttentionKind`], *optional*): Window or chunk that the layer is limited to.
        queries (`int`, *optional*): Q, the last columns whose rows are wanted; all N if `None`.

    Returns:
        `torch.BoolTensor` of shape `(B, Q, P + N)`.
    """
    position_BN, segment_BN, reach_BN, block_N = layout.position_BN, layout.segment_BN, layout.reach_BN, layout.block_N
    column_N = torch.arange(len(block_N), device=block_N.device)
    q = slice(0 if queries is None else len(block_N) - queries, None)
    to_regular = column_N <= reach_BN[:, q, None]
    to_own_block = (block_N == block_N[q, None]) & (column_N <= column_N[q, None])
    same_document = (segment_BN[:, None, :] == segment_BN[:, q, None]) & (segment_BN[:, None, :] >= 0)
    allowed = torch.where(block_N < 0, to_regular, to_own_block) & same_document
    # Padding may attend to itself: a query that may attend to nothing turns into NaN in some kernels.
    allowed |= column_N == column_N[q, None]
    if past:
        allowed = torch.cat([allowed.new_ones(*allowed.shape[:2], past), allowed], dim=2)
    if kind.reaches_back() is not None:
        past_BP = torch.arange(past, device=position_BN.device).expand(position_BN.shape[0], -1)
        allowed &= within_reach(position_BN[:, q], torch.cat([past_BP, position_BN], dim=1), kind)
    return allowed


def within_reach(query_BQ: torch.LongTensor, key_BS: torch.LongTensor, kind: AttentionKind) -> torch.BoolTensor:
    """`(B, Q, S)`: whether the key's position is within the window, or in the chunk, of the query's position."""
    query, key = query_BQ[:, :, None], key_BS[:, None, :]
    if kind.window is not None:
        return query - key < kind.window
    return query // kind.chunk == key // kind.chunk


def additive(allowed_BQS: torch.BoolTensor, dtype: torch.dtype) -> torch.Tensor:
    """`(B, 1, Q, S)`: 0 where attention is allowed and the smallest number of `dtype` elsewhere."""
    mask = torch.zeros(allowed_BQS.shape, dtype=dtype, device=allowed_BQS.device)
    return mask.masked_fill_(~allowed_BQS, torch.finfo(dtype).min)[:, None]


def attention_masks(
    layout: BlockLayout, past: int, kinds: list[AttentionKind], dtype: torch.dtype, queries: int | None = None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What to pass to a model as `attention_mask`.

    Args:
        layout ([`BlockLayout`]): The blocks.
        past (`int`): Regular tokens in the cache.
        kinds (`list[AttentionKind]`): See [`attention_kinds`].
        dtype (`torch.dtype`): The model's.
        queries (`int`, *optional*): Q, the last columns that attend; all N if `None`.

    Returns:
        One additive mask of shape `(B, 1, Q, P + N)` while no window or chunk is exceeded or all layers are of one
        kind, and a mask per kind otherwise, under the name that transformers gives the kind.
    """
    longest = past + layout.position_BT.shape[1] + layout.k
    limited = [kind for kind in kinds if kind.reaches_back() is not None and kind.reaches_back() < longest]
    if not limited:
        return additive(allowed_attention(layout, past, queries=queries), dtype)
    masks = {kind.name: additive(allowed_attention(layout, past, kind, queries), dtype) for kind in kinds}
    return masks if len(masks) > 1 else masks[kinds[0].name]
