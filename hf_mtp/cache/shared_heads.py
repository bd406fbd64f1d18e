"""Keys and values of grouped-query attention, which are not copied for each query head that shares them.

For a pass over several tokens with an attention mask, transformers repeats keys and values for every query head
(`repeat_kv`), and so copies the whole cache once per layer. `SharedHeads` puts that off. When attention is computed,
the queries that share a head become further queries of that head instead, as transformers itself does for a single
token (`pack_gqa`). Each query attends to the same keys as before, so the result is the same.

Shapes: B batch, H query heads, G heads of keys and values, n = H / G, N columns of a pass, S key columns, D features.
"""

import torch
import torch.nn.functional as F

LEAST_COLUMNS = 512  # over all rows; below, copies take less time than Python


class SharedHeads(torch.Tensor):
    """Keys or values, `(B, G, S, D)`. Like a plain tensor in every operation, but for `repeat_kv`."""

    @classmethod
    def of(cls, states: torch.Tensor) -> torch.Tensor:
        """The same states; a plain tensor if they are few."""
        return states.as_subclass(cls) if states.shape[0] * states.shape[2] >= LEAST_COLUMNS else states

    def __getitem__(self, index):
        states = self.as_subclass(torch.Tensor)
        adds_dimension = isinstance(index, tuple) and len(index) == 5 and index[2] is None
        if adds_dimension and all(isinstance(part, slice) and part == slice(None) for part in index[:2] + index[3:]):
            return Repetition(states)
        return states[index]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func(*_plain(args), **_plain(kwargs or {}))


class Repetition:
    """What `repeat_kv` does on its way: `states[:, :, None].expand(B, G, n, S, D).reshape(B, H, S, D)`.

    Whatever else is done with it is done with a plain tensor.

    Args:
        states (`torch.Tensor` of shape `(B, G, S, D)`): Keys or values.
        repeats (`int`, *optional*): n, once it is known.
    """

    def __init__(self, states: torch.Tensor, repeats: int | None = None):
        self.states, self.repeats = states, repeats

    def plain(self) -> torch.Tensor:
        """`(B, G, 1, S, D)` or `(B, G, n, S, D)`."""
        states = self.states[:, :, None]
        return states if self.repeats is None else states.expand(-1, -1, self.repeats, -1, -1)

    def expand(self, *sizes):
        batch, groups, columns, features = self.states.shape
        if len(sizes) == 5 and (*sizes[:2], *sizes[3:]) == (batch, groups, columns, features):
            return Repetition(self.states, sizes[2])
        return self.plain().expand(*sizes)

    def reshape(self, *sizes):
        batch, groups, columns, features = self.states.shape
        if self.repeats is not None and sizes == (batch, groups * self.repeats, columns, features):
            return RepeatedHeads.of(self.states, self.repeats)
        return self.plain().reshape(*sizes)

    def __getattr__(self, name: str):
        return getattr(self.plain(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func(*_plain(args), **_plain(kwargs or {}))


class RepeatedHeads(torch.Tensor):
    """Keys or values as if repeated, `(B, H, S, D)`. Attention takes them as they are; all else repeats them first."""

    @classmethod
    def of(cls, states: torch.Tensor, repeats: int) -> "RepeatedHeads":
        """States that count as repeated, without a copy.

        Args:
            states (`torch.Tensor` of shape `(B, G, S, D)`): Keys or values.
            repeats (`int`): How many heads share a group's states, H / G.
        """
        batch, groups, columns, features = states.shape
        size = batch, groups * repeats, columns, features
        found = torch.Tensor._make_wrapper_subclass(cls, size, dtype=states.dtype, device=states.device)
        found.states, found.repeats = states, repeats
        return found

    def plain(self) -> torch.Tensor:
        """The repeated states."""
        return self.states.repeat_interleave(self.repeats, dim=1)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _can_share(*args, **kwargs):
            return _attention(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # as torch's notes on extending it have it
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*_plain(args), **_plain(kwargs or {}))


def _can_share(query: torch.Tensor, key=None, value=None, attn_mask=None, *args, is_causal=False, **kwargs) -> bool:
    both = isinstance(key, RepeatedHeads) and isinstance(value, RepeatedHeads) and not args and not is_causal
    return both and attn_mask is not None and attn_mask.dim() == 4 and query.shape[1] == key.shape[1]


def _attention(
    query: torch.Tensor, key: RepeatedHeads, value: RepeatedHeads, attn_mask: torch.Tensor, **kwargs
) -> torch.Tensor:
    """[`torch.nn.functional.scaled_dot_product_attention`] over the shared heads.

    Args:
        query (`torch.Tensor` of shape `(B, H, N, D)`): The queries.
        key, value ([`RepeatedHeads`]): `(B, H, S, D)`.
        attn_mask (`torch.Tensor` of shape `(B, 1, N, S)` or `(B, H, N, S)`): The mask.
    """
    batch, heads, columns, _ = query.shape
    repeats, groups = key.repeats, heads // key.repeats
    query_BGQD = query.reshape(batch, groups, repeats * columns, -1)
    if attn_mask.shape[1] == 1:
        attn_mask = attn_mask.expand(-1, repeats, -1, -1)
    mask_BGQS = attn_mask.reshape(attn_mask.shape[0], -1, repeats * columns, attn_mask.shape[3])
    result = F.scaled_dot_product_attention(query_BGQD, key.states, value.states, attn_mask=mask_BGQS, **kwargs)
    return result.view(batch, heads, columns, -1)


def _plain(value):
    """The value with plain tensors in it."""
    if isinstance(value, SharedHeads):
        return value.as_subclass(torch.Tensor)
    if isinstance(value, (Repetition, RepeatedHeads)):
        return value.plain()
    if isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value))
    return {name: _plain(each) for name, each in value.items()} if isinstance(value, dict) else value
