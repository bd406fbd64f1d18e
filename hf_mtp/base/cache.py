"""The cache of decoding: every row grows and rolls back by itself.

A forward pass writes the keys and values of its columns right after the tokens that a row holds. Tokens that stay are
then counted in, `keep`, and all others are overwritten by the next pass: rolling back moves a number and copies
nothing, however differently rows go on.

Shapes: B batch, H heads, N columns of a pass, S columns of storage, D features.
"""

import copy
from collections.abc import Container
from functools import partial

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ..blocks.masks import CachedColumns

SPARE_COLUMNS = 64  # storage grows by half and by no less than this
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")  # the first since transformers 5.24


def cache_name(names: Container[str]) -> str:
    """What a cache is called among these names of arguments or fields, which transformers' releases differ in."""
    return next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[0])


def copied(held: Cache) -> Cache:
    """A copy to write to. Layers that grow make new tensors when they do, so that these need no copy."""
    if not isinstance(held, Cache):
        return copy.deepcopy(held)
    twin = copy.copy(held)
    twin.layers = [
        copy.copy(layer) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) else copy.deepcopy(layer)
        for layer in held.layers
    ]
    return twin


def tokens_by_layer(cache: Cache) -> dict[int, int]:
    """How many columns of keys and values each layer of a cache has seen, of those that hold some."""
    return {
        index: int(layer.get_seq_length())
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized
    }


class Rows:
    """Where the tokens of each row begin and end; one object for all layers of a cache.

    Args:
        start_B (`torch.LongTensor` of shape `(B,)`): First column of each row that is no padding.
        columns (`int`, *optional*): Fixed size of the storage. `None` lets it grow.
    """

    def __init__(self, start_B: torch.LongTensor, columns: int | None = None):
        self.start_B = start_B
        self.length_B = torch.zeros_like(start_B)
        self.starts = start_B.tolist()  # the same, without asking the device
        self.columns = columns
        self.set_lengths([0] * len(start_B))
        self.set_ahead(torch.zeros_like(start_B))

    def set_ahead(self, ahead_B: torch.LongTensor) -> None:
        """Says how far each row's positions are ahead of a count from 0 at its first token.

        Args:
            ahead_B (`torch.LongTensor` of shape `(B,)`, or `(R, B)` for models of R position ids per token).
        """
        self.ahead_B, self.most_ahead = ahead_B, int(ahead_B.max())

    @property
    def positions(self) -> int:
        """Positions that the row which is farthest has used."""
        return self.longest + self.most_ahead

    def positions_of(self, place_BN: torch.LongTensor) -> torch.LongTensor:
        """`(B, N)` or `(R, B, N)`: position ids of columns counted from each row's first token."""
        return place_BN + self.ahead_B[..., None]

    def set_lengths(self, lengths: list[int]) -> None:
        """Says how many columns each row holds, what all layers go by until the next time."""
        self.lengths, self.longest = lengths, max(lengths)
        self.are_equal = min(lengths) == self.longest

    def next_columns(self, new: int) -> torch.LongTensor:
        """`(B, new)`: the columns that a pass of so many writes."""
        return self.length_B[:, None] + torch.arange(new, device=self.length_B.device)

    def add(self, tokens: list[int], tokens_B: torch.LongTensor | None = None) -> None:
        """Counts in so many columns more of each row; `tokens_B` is the same, if it is on the device already."""
        if tokens_B is None:
            tokens_B = torch.tensor(tokens, device=self.length_B.device)
        self.set_lengths([length + kept for length, kept in zip(self.lengths, tokens, strict=True)])
        self.length_B += tokens_B


class RollbackLayer(CacheLayerMixin):
    """Keys and values of one layer, `(B, H, S, D)`.

    Args:
        rows ([`Rows`]): Behind which columns the next pass is written.
    """

    is_sliding = False

    def __init__(self, rows: Rows):
        super().__init__()
        self.rows = rows
        # transformers makes a mask even for a plain causal pass if the cache is to be compiled.
        self.is_compileable = rows.columns is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.rows.columns or 0, states.shape[3])
            for states in (key_states, value_states)
        )
        if self.rows.columns is not None and not torch.compiler.is_compiling():
            for tensor in (self.keys, self.values):  # else CUDA graphs would copy them in and out
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Writes the columns of a pass behind each row's tokens.

        Args:
            key_states, value_states (`torch.Tensor` of shape `(B, H, N, D)`): The new columns.

        Returns:
            Keys and values to attend to: all of a fixed storage, else up to the last column written in any row.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.rows.columns is not None and torch.compiler.is_compiling():
            self._write_behind_each_row(key_states, value_states)
            return self.keys, self.values
        end = self.rows.longest + key_states.shape[2]
        if self.rows.columns is None and end > self.keys.shape[2]:
            self._grow(end)
        if self.rows.are_equal:
            new = self.rows.longest, key_states.shape[2]
            self.keys.narrow(2, *new).copy_(key_states)
            self.values.narrow(2, *new).copy_(value_states)
        else:
            self._write_behind_each_row(key_states, value_states)
        end = self.rows.columns or end
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)

    def _write_behind_each_row(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        new_N = torch.arange(key_states.shape[2], device=key_states.device)
        column_BN = self.rows.length_B[:, None] + new_N
        for storage, states in ((self.keys, key_states), (self.values, value_states)):
            storage.scatter_(2, column_BN[:, None, :, None].expand_as(states), states)

    def _grow(self, columns: int) -> None:
        columns = max(columns, self.keys.shape[2] * 3 // 2, self.keys.shape[2] + SPARE_COLUMNS)
        for name in ("keys", "values"):
            old = getattr(self, name)
            grown = old.new_zeros(*old.shape[:2], columns, old.shape[3])
            grown[:, :, : old.shape[2]] = old
            setattr(self, name, grown)

    def get_seq_length(self) -> int:
        return self.rows.longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.rows.columns or self.rows.longest + query_length, 0

    def get_max_length(self) -> int:
        return self.rows.columns or -1


class RollbackCache(Cache):
    """A [`~transformers.Cache`] whose rows roll back each by itself.

    Layers keep every token, also those with a sliding window: the attention masks limit what these see.

    Args:
        start_B (`torch.LongTensor` of shape `(B,)`): First column of each row that is no padding.
        columns (`int`, *optional*): Fixed size of the storage. `None` lets it grow.
        offloading (`bool`, *optional*): Whether layers wait on the CPU while others run.
    """

    def __init__(self, start_B: torch.LongTensor, columns: int | None = None, offloading: bool = False):
        self.rows = Rows(start_B, columns)
        self.beside: dict[str, torch.Tensor] = {}  # what the model is given with each token, `(B, 1, ...)`
        super().__init__(layer_class_to_replicate=partial(RollbackLayer, self.rows), offloading=offloading)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds."""
        return self.rows.lengths

    def seen_by(self, new: int) -> CachedColumns:
        """What the attention of a pass of `new` columns sees."""
        return CachedColumns(self.rows.start_B, self.rows.length_B, self.rows.columns or self.rows.longest + new)

    @property
    def is_plain(self) -> bool:
        """Whether it holds one row without padding and shows no columns but its own."""
        return self.rows.starts == [0] and self.rows.columns is None

    def keep(self, tokens: list[int], tokens_B: torch.LongTensor | None = None) -> None:
        """Counts in the first columns of the last pass; all others are rolled back.

        Args:
            tokens (`list[int]`): How many, for each row.
            tokens_B (`torch.LongTensor` of shape `(B,)`, *optional*): The same, if it is on the device already.
        """
        self.rows.add(tokens, tokens_B)

    def select_rows(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        index = torch.tensor(rows, device=self.rows.length_B.device)
        self.rows.starts = [self.rows.starts[row] for row in rows]
        self.rows.set_lengths([self.rows.lengths[row] for row in rows])
        self.rows.start_B, self.rows.length_B = self.rows.start_B[index], self.rows.length_B[index]
        self.rows.ahead_B = self.rows.ahead_B[..., index]
        self.beside = {name: value[index.to(value.device)] for name, value in self.beside.items()}
        for layer in self.layers:
            if not layer.is_initialized:  # of an image, and there is none
                continue
            layer.keys, layer.values = (
                layer.keys[index.to(layer.keys.device)],
                layer.values[index.to(layer.keys.device)],
            )

    def take_over(self, cache: Cache) -> None:
        """Starts with the tokens of another cache, which stays as it is.

        Args:
            cache ([`~transformers.Cache`]): What `generate` was given. Of a layer with a sliding window the last
                tokens are there, and no others are needed.
        """
        length = cache.get_seq_length()
        for index, layer in enumerate(cache.layers):
            if not layer.is_initialized:
                continue
            held = min(length, layer.keys.shape[2])
            keys, values = layer.keys, layer.values
            if layer.get_max_length() == -1 or held < length:  # grown to measure, or a full window
                keys, values = keys[:, :, -held:], values[:, :, -held:]
            padding = (0, 0, length - held, 0)
            self.update(
                torch.nn.functional.pad(keys[:, :, :held], padding),
                torch.nn.functional.pad(values[:, :, :held], padding),
                index,
            )
        self.keep([length] * len(self.lengths))

    def see(self, cache: Cache, layers: list[int], beside: dict[str, torch.Tensor]) -> None:
        """Shows the model what is no text: it stays as it is, whatever is read or rolled back.

        Args:
            cache ([`~transformers.Cache`]): What `generate` was given.
            layers (`list[int]`): Its layers that hold an image, say.
            beside (`dict[str, torch.Tensor]` of shapes `(B, 1, ...)`): What the model is given with each token.
        """
        for index in layers:
            self.layers[index] = copy.copy(cache.layers[index])
        self.beside = beside

    def hand_over(self, cache: Cache) -> None:
        """Appends to another cache the tokens that it lacks. Rows shorter than the longest end in zeros."""
        known, length = cache.get_seq_length(), self.rows.longest
        if length == known:
            return
        ends_B = self.rows.length_B[:, None, None, None]
        in_row = torch.arange(known, length, device=ends_B.device)[None, None, :, None] < ends_B
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, RollbackLayer) or not layer.is_initialized:
                continue
            inside = in_row.to(layer.keys.device)
            cache.update(layer.keys[:, :, known:length] * inside, layer.values[:, :, known:length] * inside, index)
