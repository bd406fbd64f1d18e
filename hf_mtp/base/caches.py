"""Helpers for transformers' caches: their argument names, their contents, and copies of them."""

import copy
import inspect
from collections.abc import Container

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")  # the first since transformers 5.24


def cache_name(names: Container[str]) -> str:
    """The name of the cache among these arguments or fields. It differs between releases of transformers."""
    return next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[0])


def is_dropped(cache: Cache, model: PreTrainedModel, ids_BS: torch.LongTensor) -> bool:
    """Whether plain decoding would read a text from its start instead of continuing from its cache.

    Phi-3 does so where its rotary embeddings change, because the keys in the cache have the earlier ones.

    Args:
        cache ([`~transformers.Cache`]): The cache.
        model ([`~transformers.PreTrainedModel`]): The base.
        ids_BS (`torch.LongTensor` of shape `(B, S)`): The whole texts, as plain decoding has them.
    """
    name = cache_name(inspect.signature(model.forward).parameters)
    given = {name: cache, "use_cache": True, "next_sequence_length": 1}
    return model.prepare_inputs_for_generation(ids_BS, **given).get(name) is None


def copied(held: Cache) -> Cache:
    """A copy that can be written to without changing `held`. Most layers share their storage with it."""
    if not isinstance(held, Cache):
        return copy.deepcopy(held)
    twin = copy.copy(held)
    twin.layers = [_copied_layer(layer) for layer in held.layers]
    return twin


def _copied_layer(layer):
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):  # these layers create new tensors when they grow
        return copy.copy(layer)
    if type(layer) is not StaticLayer:
        return copy.deepcopy(layer)
    twin = copy.copy(layer)  # the copy writes past the columns that `layer` counts, so the storage can be shared
    twin.cumulative_length = layer.cumulative_length.clone()
    return twin


def replace_contents(cache: Cache, other: Cache) -> None:
    """Gives a cache the layers of another one, such as a copy that has grown, in one step that cannot fail halfway."""
    if cache is not other:
        cache.layers[:] = other.layers


def tokens_by_layer(cache: Cache) -> dict[int, int]:
    """The number of columns that each initialized layer of keys and values has seen."""
    return {
        index: int(layer.get_seq_length())
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized
    }
