"""The cache of decoding, in which every row grows and rolls back independently.

A forward pass writes the keys and values of its columns right after the tokens that a row holds. `keep` then counts
the accepted ones; the next pass overwrites the others. So a rollback only changes a length, and copies nothing.

Shapes: B batch, H heads, N columns of a pass, S columns of storage, D features.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from ..layout.attention import CachedColumns
from .column_attention import KeysByColumn
from .rows import Rows
from .shared_heads import SharedHeads

SPARE_COLUMNS = 64  # storage grows by half, and at least by this many


class RollbackLayer(CacheLayerMixin):
    """Keys and values of one layer, `(B, H, S, D)`.

    Args:
        rows ([`Rows`]): The lengths of the rows, after which the next pass is written.
    """

    is_sliding = False

    def __init__(self, rows: Rows):
        super().__init__()
        self.rows = rows
        # With a compileable cache, transformers creates a mask even for a plain causal pass.
        self.is_compileable = rows.columns is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.rows.columns or 0, states.shape[3])
            for states in (key_states, value_states)
        )
        if self.rows.columns is not None and not torch.compiler.is_compiling():
            for tensor in (self.keys, self.values):  # otherwise CUDA graphs would copy them in and out
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Writes the columns of a pass after each row's tokens.

        Args:
            key_states, value_states (`torch.Tensor` of shape `(B, H, N, D)`): The new columns.

        Returns:
            Keys and values to attend to: all columns of a fixed storage, else those up to the longest row's end.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.rows.columns is not None and torch.compiler.is_compiling():
            self._write_after_each_row(key_states, value_states)
            return self.keys, self.values
        end = self.rows.longest + key_states.shape[2]
        if self.rows.columns is None and end > self.keys.shape[2]:
            self._grow(end)
        if self.rows.are_equal:
            new = self.rows.longest, key_states.shape[2]
            self.keys.narrow(2, *new).copy_(key_states)
            self.values.narrow(2, *new).copy_(value_states)
        else:
            self._write_after_each_row(key_states, value_states)
        end = self.rows.columns or end
        keys, values = self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)
        if self.rows.column_attention is not None:
            keys = KeysByColumn.of(keys, self.rows.column_attention)
        elif self.rows.shares_heads:
            keys, values = SharedHeads.of(keys), SharedHeads.of(values)
        return keys, values

    def _write_after_each_row(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        new_N = torch.arange(key_states.shape[2], device=key_states.device)
        column_BN = self.rows.length_B[:, None] + new_N
        for storage, states in ((self.keys, key_states), (self.values, value_states)):
            _put(storage, column_BN, states.transpose(1, 2))

    def move(self, source_BP: torch.LongTensor, target_BP: torch.LongTensor) -> None:
        """Copies columns of the storage to others."""
        for storage in (self.keys, self.values):
            row_B1, source, target = _rows_of(storage), source_BP.to(storage.device), target_BP.to(storage.device)
            _put(storage, target, storage.transpose(1, 2)[row_B1, source])

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
    """A [`~transformers.Cache`] whose rows roll back independently.

    All layers keep every token. Where a layer has a sliding window, the attention mask limits what it sees.

    Args:
        start_B (`torch.LongTensor` of shape `(B,)`): First column of each row that is not padding.
        columns (`int`, *optional*): Fixed size of the storage. If `None`, it grows.
        offloading (`bool`, *optional*): Whether layers are kept on the CPU while others run.
    """

    def __init__(self, start_B: torch.LongTensor, columns: int | None = None, offloading: bool = False):
        self.rows = Rows(start_B, columns)
        self.extra_inputs: dict[str, torch.Tensor] = {}  # passed to the model with each token, `(B, 1, ...)`
        super().__init__(layer_class_to_replicate=partial(RollbackLayer, self.rows), offloading=offloading)

    def seen_by(self, new: int) -> CachedColumns:
        """The cached columns as the attention mask of a pass of `new` columns needs them."""
        rows = self.rows
        return CachedColumns(rows.start_B, rows.length_B, rows.columns or rows.longest + new, rows.hidden_BP)

    @property
    def is_causal(self) -> bool:
        """Whether the model's own causal mask is right for a pass: nothing is hidden, all rows are equally long."""
        rows = self.rows
        return not any(rows.starts) and not rows.hidden_BP.shape[1] and rows.are_equal and rows.columns is None

    def keep(self, tokens: list[int], tokens_B: torch.LongTensor | None = None) -> None:
        """Keeps the first columns of the last pass and rolls the others back.

        Args:
            tokens (`list[int]`): Number of columns to keep, for each row.
            tokens_B (`torch.LongTensor` of shape `(B,)`, *optional*): The same numbers, if already on the device.
        """
        self.rows.add(tokens, tokens_B)

    def gather(self, columns: list[list[int]]) -> None:
        """Moves columns of the last pass to its first ones, so that `keep` keeps an accepted path of a tree.

        Args:
            columns (`list[list[int]]`): The columns that each row is to keep, in increasing order.
        """
        width = max(map(len, columns))
        moves = [[*row, *range(len(row), width)] for row in columns]
        same = next((place for place in range(width) if any(row[place] != place for row in moves)), width)
        if same == width:
            return
        _wait_for_layers(self)
        length_B1 = self.rows.length_B[:, None]
        source_BP = length_B1 + torch.tensor([row[same:] for row in moves], device=length_B1.device)
        target_BP = length_B1 + torch.arange(same, width, device=length_B1.device)
        for layer in self.layers:
            if isinstance(layer, RollbackLayer) and layer.is_initialized:
                layer.move(source_BP, target_BP)

    def select_rows(self, rows: list[int]) -> None:
        """Drops all other rows."""
        index = torch.tensor(rows, device=self.rows.length_B.device)
        self.rows.select(rows, index)
        self.extra_inputs = {name: value[index.to(value.device)] for name, value in self.extra_inputs.items()}
        _wait_for_layers(self)
        for layer in self.layers:
            if layer.is_initialized:  # else cross-attention to an image, without an image
                there = index.to(layer.keys.device)
                layer.keys, layer.values = layer.keys[there], layer.values[there]

    def adopt(self, given: Cache) -> None:
        """Copies the tokens of the cache that was passed to `generate`.

        A layer with a sliding window may hold only the last tokens; it needs no others.
        """
        length = int(given.get_seq_length())
        _wait_for_layers(given)
        for index, layer in enumerate(given.layers):
            if not layer.is_initialized or layer.keys is None:  # a layer that shares another's has none
                continue
            held = min(length, layer.keys.shape[2])
            keys, values = layer.keys.to(layer.device), layer.values.to(layer.device)  # they may be offloaded
            if layer.get_max_length() == -1 or held < length:  # a growing layer, or a full window
                keys, values = keys[:, :, -held:], values[:, :, -held:]
            keys, values = (F.pad(states[:, :, :held], (0, 0, length - held, 0)) for states in (keys, values))
            self.update(keys, values, index)
        self.keep([length] * len(self.rows.lengths))

    def give_back(self, given: Cache) -> Cache:
        """Appends the new tokens to the cache that was passed to `generate`. Padding at the left is zeros."""
        known, length = int(given.get_seq_length()), self.rows.longest
        if length == known:
            return given
        start_B = self.rows.start_B
        in_row = (torch.arange(known, length, device=start_B.device) >= start_B[:, None])[:, None, :, None]
        _wait_for_layers(self)
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, RollbackLayer) or not layer.is_initialized:
                continue
            inside = in_row.to(layer.device)
            # They may be offloaded, and a new layer of `given` stays on the device of the first states that it gets.
            new = (states.to(layer.device)[:, :, known:length] for states in (layer.keys, layer.values))
            given.update(*(states * inside for states in new), index)
        return given

    def append_rows(self, other: "RollbackCache") -> None:
        """Appends the rows of another growing cache of the same model. `other` must not be used afterwards."""
        self.rows.append(other.rows)
        for layer, new in zip(self.layers, other.layers, strict=True):
            columns = max(layer.keys.shape[2], new.keys.shape[2])
            layer.keys = torch.cat([_padded(layer.keys, columns), _padded(new.keys, columns)])
            layer.values = torch.cat([_padded(layer.values, columns), _padded(new.values, columns)])

    def share_layers(self, cache: Cache, layers: list[int], extra_inputs: dict[str, torch.Tensor]) -> None:
        """Shares the layers of another cache that hold no text, such as an image. No pass or rollback changes them.

        Args:
            cache ([`~transformers.Cache`]): The cache that was passed to `generate`.
            layers (`list[int]`): Indices of its layers that hold something other than text.
            extra_inputs (`dict[str, torch.Tensor]` of shapes `(B, 1, ...)`): Inputs of the model with each token.
        """
        for index in layers:
            self.layers[index] = copy.copy(cache.layers[index])
        self.extra_inputs = extra_inputs


def _wait_for_layers(cache: Cache) -> None:
    """Waits until no layer of an offloaded cache is on its way back to the device, as the first one is after a pass.

    Only transformers' `update` waits by itself. All other readers would get what has not arrived yet.
    """
    if cache.offloading:
        cache.prefetch_stream.synchronize()


def _put(storage: torch.Tensor, column_BN: torch.LongTensor, states_BNHD: torch.Tensor) -> None:
    """Writes to columns of each row. On a CPU, `scatter_` would copy the whole storage."""
    storage.transpose(1, 2).index_put_((_rows_of(storage), column_BN), states_BNHD)


def _rows_of(storage: torch.Tensor) -> torch.LongTensor:
    """`(B, 1)`: the numbers of the rows."""
    return torch.arange(storage.shape[0], device=storage.device)[:, None]


def _padded(storage: torch.Tensor, columns: int) -> torch.Tensor:
    """`(B, H, columns, D)`: keys or values, padded on the right with zeros."""
    return F.pad(storage, (0, 0, 0, columns - storage.shape[2]))
