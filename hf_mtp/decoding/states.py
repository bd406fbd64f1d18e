"""Hidden states and attentions in the shapes that plain decoding returns.

Shapes: H heads, Q queries, S columns of the text, W columns that a cache returns, D features.
"""

import torch
import torch.nn.functional as F
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from .sequence import Sequence


def prepend_states(row: Sequence, before: dict[str, tuple], index: int) -> None:
    """Puts the states of a prompt that the base read before those of the prompt's last token.

    Args:
        row ([`Sequence`]): The row; its first record has the states of the last token.
        before (`dict`): `hidden_states` and `attentions` of all tokens but the last, `(B, T - 1, D)` and
            `(B, H, T - 1, W)` per layer, if they were requested.
        index (`int`): Number of the row in these.
    """
    record = row.records[0]
    for name, layers in before.items():
        last = getattr(record, name)
        if name == "hidden_states":
            layers = [states[..., index, :, :] for states in layers]
        else:
            layers = [_over_text(weights[index], two.shape[-1]) for weights, two in zip(layers, last, strict=True)]
        setattr(record, name, tuple(torch.cat(pair, dim=-2) for pair in zip(layers, last, strict=True)))


def _over_text(weight_HQW: torch.Tensor, columns: int) -> torch.Tensor:
    """`(H, Q, columns)`: attention weights over the text before its last token, not over the columns of a cache."""
    weight_HQW = weight_HQW[..., : columns - 1]
    return F.pad(weight_HQW, (columns - 1 - weight_HQW.shape[-1], 1))


def restore_padding(row: Sequence) -> None:
    """Puts zeros where the padding of a row is that was decoded without it.

    Args:
        row ([`Sequence`]): The row.
    """
    for index, record in enumerate(row.records):
        queries = 0 if index else row.padding
        for name, columns in (("hidden_states", 0), ("attentions", row.padding)):
            layers = getattr(record, name)
            if layers is not None:
                setattr(record, name, tuple(F.pad(state, (columns, 0, queries, 0)) for state in layers))


def attentions_as_shown(attentions: tuple | None, cache: Cache | None) -> tuple | None:
    """Attention weights over the columns that the layers of a cache return.

    Args:
        attentions (`tuple` per token of tuples per layer of `torch.Tensor` of shape `(B, H, Q, S)`): Over the text.
        cache ([`~transformers.Cache`], *optional*): The cache that was passed to `generate`, or that it created.
    """
    layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, CacheLayerMixin)]
    if attentions is None or len(attentions[0]) != len(layers):  # layers without attention, or that share keys
        return attentions
    return tuple(tuple(_as_shown(*pair) for pair in zip(of_token, layers, strict=True)) for of_token in attentions)


def _as_shown(weight_BHQS: torch.Tensor, layer: CacheLayerMixin) -> torch.Tensor:
    """`(B, H, Q, W)`: a sliding window moves with the text, and a static layer always returns all its columns."""
    queries, columns = weight_BHQS.shape[2:]
    size = layer.get_max_length()
    if layer.is_sliding:
        weight_BHQS = weight_BHQS[..., max(0, columns - queries - size + 1) :]
    return (
        F.pad(weight_BHQS, (0, max(0, size - weight_BHQS.shape[-1])))
        if isinstance(layer, StaticLayer)
        else weight_BHQS
    )
