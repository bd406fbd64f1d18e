"""Keys to which each regular column of a pass attends in a call of its own, as in plain decoding.

Attention over several columns at once rounds in another way than over one: its keys are longer, and hidden by a mask.
The cache returns `KeysByColumn` instead of plain keys, and these take over when attention is computed.

Shapes: B batch, H heads, T regular columns, N columns of a pass, S key columns, D features.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


@dataclass
class ColumnAttention:
    """Attention over the columns of one pass.

    Args:
        regular (`int`): T, regular columns. Each attends to the keys that plain decoding would pass, and to no mask.
        columns (`int`): N, all columns. Those after the regular ones share one call.
    """

    regular: int
    columns: int
    seen_by_mask: dict[tuple, list[list[torch.Tensor | slice]]] = field(default_factory=dict)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """[`torch.nn.functional.scaled_dot_product_attention`], with its arguments."""
        if attn_mask is None or query.shape[2] != self.columns:  # what plain decoding calls, too
            return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **kwargs)
        seen = self._seen(attn_mask)
        rows = [slice(None)] if len(seen) == 1 else [slice(row, row + 1) for row in range(len(seen))]
        by_row = []
        for row, seen_T in zip(rows, seen, strict=True):
            inputs = query[row].split(1, dim=2), key[row], value[row]
            by_row.append(torch.cat(_one_by_one(*inputs, seen_T, kwargs), dim=2))
        regular = torch.cat(by_row) if len(by_row) > 1 else by_row[0]
        if self.columns == self.regular:
            return regular
        of_masks = query[:, :, self.regular :], key, value, attn_mask[:, :, self.regular :]
        return torch.cat([regular, F.scaled_dot_product_attention(*of_masks, **kwargs)], dim=2)

    def _seen(self, mask_BHNS: torch.Tensor) -> list[list[torch.Tensor | slice]]:
        """Which keys each regular column attends to, by row of the batch; one list if all rows are alike."""
        place = mask_BHNS.data_ptr(), mask_BHNS.shape
        if place not in self.seen_by_mask:
            mask_BTS = mask_BHNS[:, 0, : self.regular]
            is_bool = mask_BTS.dtype is torch.bool
            allowed_BTS = mask_BTS if is_bool else mask_BTS > torch.finfo(mask_BTS.dtype).min
            if bool((allowed_BTS == allowed_BTS[:1]).all()):
                allowed_BTS = allowed_BTS[:1]
            self.seen_by_mask[place] = [[_as_slice(keys_S.nonzero()[:, 0]) for keys_S in row] for row in allowed_BTS]
        return self.seen_by_mask[place]


def _one_by_one(
    queries: tuple[torch.Tensor, ...],
    key: torch.Tensor,
    value: torch.Tensor,
    seen: list[torch.Tensor | slice],
    kwargs: dict,
) -> list[torch.Tensor]:
    return [
        F.scaled_dot_product_attention(query, key[:, :, keys], value[:, :, keys], **kwargs)
        for query, keys in zip(queries, seen, strict=False)
    ]


def _as_slice(index: torch.LongTensor) -> torch.Tensor | slice:
    """The index of columns, or a slice where these are in sequence."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index


class KeysByColumn(torch.Tensor):
    """Keys, `(B, H, S, D)`, that compute attention column by column.

    What models do with keys before attention keeps the class. Anything else returns plain tensors.
    """

    attention: ColumnAttention | None = None

    @classmethod
    def of(cls, keys: torch.Tensor, attention: ColumnAttention) -> "KeysByColumn":
        """The same keys, with attention of this kind."""
        found = keys.as_subclass(cls)
        found.attention = attention
        return found

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            keys = args[1] if len(args) > 1 else kwargs["key"]
            args, kwargs = ([_plain(x) for x in args], {name: _plain(x) for name, x in kwargs.items()})
            return keys.attention(*args, **kwargs)
        result = super().__torch_function__(func, types, args, kwargs)
        if not isinstance(result, cls):
            return result
        if func in _BEFORE_ATTENTION:
            result.attention = args[0].attention
            return result
        return _plain(result)


_BEFORE_ATTENTION = {
    torch.Tensor.__getitem__,
    torch.Tensor.contiguous,
    torch.Tensor.expand,
    torch.Tensor.repeat_interleave,
    torch.Tensor.reshape,
    torch.Tensor.to,
    torch.repeat_interleave,
}


def _plain(value):
    return value.as_subclass(torch.Tensor) if isinstance(value, KeysByColumn) else value
