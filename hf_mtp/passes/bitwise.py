"""Computes regular columns bit for bit as in passes over a single column.

A pass over several columns rounds differently than passes over one column, for two reasons. A matrix product over many
rows may sum in a different order. And attention gets longer keys and a mask. Within `bitwise_columns`, products have
only as many rows as keep the order, and attention runs separately for each regular column, over the keys that plain
decoding would pass. Masks need not be exact, so they share one call.

All other layers of a decoder process each column independently. `bitwise_check` tests this for the given model.

Shapes: B batch, T regular columns, M masks, N = T + M, D features, I and O input and output features.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..cache.column_attention import ColumnAttention
from ..cache.rows import Rows
from .summation_order import rows_in_order

# Sizes of passes, by model, in which no product has to be split. These are run without the mode, which takes time.
_whole: "weakref.WeakKeyDictionary[PreTrainedModel, set[tuple]]" = weakref.WeakKeyDictionary()


@contextmanager
def bitwise_columns(model: PreTrainedModel, rows: Rows, batch: int, regular: int, masks: int) -> Iterator[None]:
    """Within the context, decoding passes of this thread compute regular columns bit for bit as passes over one
    column.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        rows ([`Rows`]): Those of the cache.
        batch (`int`), regular (`int`), masks (`int`): B, T and M of the pass.
    """
    known, size = _whole.setdefault(model, set()), (batch, regular, masks, torch.get_num_threads())
    rows.column_attention = ColumnAttention(regular, regular + masks)
    try:
        if size in known:
            yield
            return
        with OrderedProducts(model, batch, regular, masks) as products:
            yield
        if products.are_whole:
            known.add(size)
    finally:
        rows.column_attention = None


class OrderedProducts(TorchFunctionMode):
    """Within the context, products with the base's weights sum each regular column in the order of plain decoding.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base. Adapters' weights act on masks only.
        batch (`int`), regular (`int`), masks (`int`): B, T and M of the pass.

    Attributes:
        are_whole (`bool`): Whether no product had to be split so far, and none may have to in such a pass.
    """

    def __init__(self, model: PreTrainedModel, batch: int, regular: int, masks: int):
        super().__init__()
        self.batch, self.regular, self.columns, self.are_whole = batch, regular, regular + masks, True
        parameters = (p for name, p in model.named_parameters() if "lora_" not in name)
        self.storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        compute = _COMPUTE.get(func)
        if compute is None:
            return func(*args, **(kwargs or {}))
        return compute(self, *args, **(kwargs or {}))

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._product(lambda rows, bias: F.linear(rows, weight, bias), x, weight, bias)

    def _addmm(self, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, **kwargs) -> torch.Tensor:
        """[`torch.addmm`], which GPT-2's layers call."""
        return self._product(lambda rows, bias: torch.addmm(bias, rows, weight, **kwargs), x, weight.T, bias)

    def _product(
        self, product: Callable, x: torch.Tensor, weight_OI: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if weight_OI.untyped_storage().data_ptr() not in self.storages or x.dim() not in (2, 3):
            return product(x, bias)
        given, x = x.stride(), x.reshape(-1, x.shape[-1]).view(x.shape)  # torch chooses by strides, even of size 1
        if given != x.stride() or (x.dim() == 2 and not self._is_whole(x)):  # an expert's tokens: a number by chance
            self.are_whole = False
        zero, total = None if bias is None else torch.zeros_like(bias), x.shape[:-1].numel()
        most = rows_in_order(lambda probe: product(probe, zero), weight_OI, x.dim(), total, self.batch)
        if most == total:
            return product(x, bias)
        self.are_whole = False
        return self._in_parts(product, x, bias, most) if most else self._by_column(product, x, bias)

    def _is_whole(self, x: torch.Tensor) -> bool:
        """Whether the input has one row for every column of the pass."""
        return x.shape[:-1] in ((self.batch, self.columns), (self.batch * self.columns,))

    def _in_parts(self, product: Callable, x: torch.Tensor, bias: torch.Tensor | None, most: int) -> torch.Tensor:
        """Products over exactly so many rows, until all regular columns are computed, and one over what is left."""
        is_whole = self._is_whole(x)
        x_BnD = x.view(self.batch if is_whole else 1, -1, x.shape[-1])
        pieces = x_BnD.tensor_split([self.regular if is_whole else x_BnD.shape[1]], dim=1)
        row_rI = torch.cat([piece.flatten(0, 1) for piece in pieces]) if len(x_BnD) > 1 else x_BnD[0]
        regular, total, found = pieces[0].shape[:2].numel(), len(row_rI), []
        for start in range(0, regular, most):
            first = min(start, total - most)  # fewer rows might be summed in another order: some are computed twice
            part = row_rI[first : first + most]
            found.append(product(part if x.dim() == 2 else part[None], bias).flatten(0, -2)[start - first :])
        if (left := row_rI[len(found) * most :]).shape[0]:
            found.append(product(left, bias))
        by_kind = torch.cat(found).split([piece.shape[:2].numel() for piece in pieces])
        by_kind = [part.view(len(x_BnD), -1, part.shape[-1]) for part in by_kind]
        return torch.cat(by_kind, dim=1).view(*x.shape[:-1], -1)

    def _by_column(self, product: Callable, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Products over one column of all rows of the batch, as in plain decoding, and one over all masks."""
        is_whole = self._is_whole(x)
        if x.dim() == 2 and not is_whole:  # no batch is left
            return product(x, bias)
        x_BnD = x.view(self.batch, -1, x.shape[-1])
        regular = self.regular if is_whole else x_BnD.shape[1]
        parts = [part for part in x_BnD.tensor_split([*range(1, regular + 1)], dim=1) if part.shape[1]]
        parts = [product(part.flatten(0, 1) if x.dim() == 2 else part.contiguous(), bias) for part in parts]
        return torch.cat([part.view(self.batch, -1, part.shape[-1]) for part in parts], dim=1).view(*x.shape[:-1], -1)


_COMPUTE = {F.linear: OrderedProducts._linear, torch.addmm: OrderedProducts._addmm}
