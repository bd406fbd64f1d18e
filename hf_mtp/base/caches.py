"""What transformers calls a cache, and what any cache holds."""

import copy
from collections.abc import Container

from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")  # the first since transformers 5.24


def cache_name(names: Container[str]) -> str:
    """What a cache is called among these names of arguments or fields, which transformers' releases differ in."""
    return next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[0])


def copied(held: Cache) -> Cache:
    """A copy to write to; what `held` has is as before. Most layers share their storage with it."""
    if not isinstance(held, Cache):
        return copy.deepcopy(held)
    twin = copy.copy(held)
    twin.layers = [_copied_layer(layer) for layer in held.layers]
    return twin


def _copied_layer(layer):
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):  # make new tensors when they grow
        return copy.copy(layer)
    if type(layer) is not StaticLayer:
        return copy.deepcopy(layer)
    twin = copy.copy(layer)  # writes behind what it holds, where nobody looks
    twin.cumulative_length = layer.cumulative_length.clone()
    return twin


def replace_contents(cache: Cache, copy: Cache) -> None:
    """Makes a cache what a copy of it has become, in one step that cannot fail halfway."""
    if cache is not copy:
        cache.layers[:] = copy.layers


def tokens_by_layer(cache: Cache) -> dict[int, int]:
    """How many columns of keys and values each layer of a cache has seen, of those that hold some."""
    return {
        index: int(layer.get_seq_length())
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized
    }
