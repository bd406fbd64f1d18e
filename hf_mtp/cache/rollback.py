"""The cache of decoding: every row grows and rolls back by itself.

A forward pass writes the keys and values of its columns right after the tokens that a row holds. Tokens that stay are
then counted in, `keep`, and all others are overwritten by the next pass: rolling back moves a number and copies
nothing, however differently rows go on.

Shapes: B batch, H heads, N columns of a pass, S columns of storage, D features.
"""

import copy
from functools import partial

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..layout.attention import CachedColumns, padded_behind
from .rows import Rows

SPARE_COLUMNS = 64  # storage grows by half and by no less than this


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
        self.extra_inputs: dict[str, torch.Tensor] = {}  # what the model is given with each token, `(B, 1, ...)`
        super().__init__(layer_class_to_replicate=partial(RollbackLayer, self.rows), offloading=offloading)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds."""
        return self.rows.lengths

    def seen_by(self, new: int) -> CachedColumns:
        """What the attention of a pass of `new` columns sees."""
        rows = self.rows
        return CachedColumns(rows.start_B, rows.length_B, rows.columns or rows.longest + new, rows.hidden_BP)

    @property
    def is_causal(self) -> bool:
        """Whether a model's own causal mask is right for a plain pass: nothing hidden, and all rows equally long."""
        rows = self.rows
        return not any(rows.starts) and not rows.hidden_BP.shape[1] and rows.are_equal and rows.columns is None

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
        self.rows.offset_B, self.rows.hidden_BP = self.rows.offset_B[..., index], self.rows.hidden_BP[index]
        self.extra_inputs = {name: value[index.to(value.device)] for name, value in self.extra_inputs.items()}
        for layer in self.layers:
            if not layer.is_initialized:  # of an image, and there is none
                continue
            layer.keys, layer.values = (
                layer.keys[index.to(layer.keys.device)],
                layer.values[index.to(layer.keys.device)],
            )

    def adopt(self, given: Cache) -> None:
        """Starts with the tokens of another cache, which stays as it is.

        Args:
            given ([`~transformers.Cache`]): What `generate` got. A layer with a sliding window holds the last tokens
                only, and needs no others.
        """
        length = int(given.get_seq_length())
        for index, layer in enumerate(given.layers):
            if not layer.is_initialized:
                continue
            held = min(length, layer.keys.shape[2])
            keys, values = layer.keys.to(layer.device), layer.values.to(layer.device)  # it may be offloaded
            if layer.get_max_length() == -1 or held < length:  # a growing layer, or a full window
                keys, values = keys[:, :, -held:], values[:, :, -held:]
            padding = (0, 0, length - held, 0)
            pad = torch.nn.functional.pad
            self.update(pad(keys[:, :, :held], padding), pad(values[:, :, :held], padding), index)
        self.keep([length] * len(self.lengths))

    def give_back(self, given: Cache) -> Cache:
        """Appends to the cache that `generate` got the tokens that it lacks. Padding at the left is zeros.

        Args:
            given ([`~transformers.Cache`]): What `generate` got.
        """
        known, length = int(given.get_seq_length()), self.rows.longest
        if length == known:
            return given
        start_B = self.rows.start_B
        in_row = (torch.arange(known, length, device=start_B.device) >= start_B[:, None])[:, None, :, None]
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, RollbackLayer) or not layer.is_initialized:
                continue
            inside = in_row.to(layer.keys.device)
            given.update(layer.keys[:, :, known:length] * inside, layer.values[:, :, known:length] * inside, index)
        return given

    def append_rows(self, other: "RollbackCache") -> None:
        """Adds the rows of another cache of the same model behind these.

        Args:
            other ([`RollbackCache`]): A cache that grows, as this one does. It must not be used afterwards.
        """
        rows, more = self.rows, other.rows
        rows.starts = rows.starts + more.starts
        rows.set_lengths(rows.lengths + more.lengths)
        rows.start_B = torch.cat([rows.start_B, more.start_B])
        rows.length_B = torch.cat([rows.length_B, more.length_B])
        rows.set_position_offset(torch.cat([rows.offset_B, more.offset_B], dim=-1))
        columns = max(rows.hidden_BP.shape[1], more.hidden_BP.shape[1])
        rows.hidden_BP = torch.cat([padded_behind(each.hidden_BP, columns) for each in (rows, more)])
        for layer, new in zip(self.layers, other.layers, strict=True):
            columns = max(layer.keys.shape[2], new.keys.shape[2])
            layer.keys = torch.cat([_padded(layer.keys, columns), _padded(new.keys, columns)])
            layer.values = torch.cat([_padded(layer.values, columns), _padded(new.values, columns)])

    def share_layers(self, cache: Cache, layers: list[int], extra_inputs: dict[str, torch.Tensor]) -> None:
        """Shows the model what is no text: it stays as it is, whatever is read or rolled back.

        Args:
            cache ([`~transformers.Cache`]): What `generate` was given.
            layers (`list[int]`): Its layers that hold an image, say.
            extra_inputs (`dict[str, torch.Tensor]` of shapes `(B, 1, ...)`): What the model gets with each token.
        """
        for index in layers:
            self.layers[index] = copy.copy(cache.layers[index])
        self.extra_inputs = extra_inputs


def _padded(storage: torch.Tensor, columns: int) -> torch.Tensor:
    """`(B, H, columns, D)`: the same keys or values, with empty columns behind them."""
    return torch.nn.functional.pad(storage, (0, 0, 0, columns - storage.shape[2]))
