"""Finds the maximum number of rows for which a matrix product keeps its order of summation.

A product over many rows may use a different kernel than one over a single row, with a different order of summation.
Then its rows round differently. The order depends on the shapes, not on the values. So it can be detected with a few
rows whose terms cancel: their dot products consist of rounding errors only, which differ between any two orders.

Shapes: n rows, I input features, O output features.
"""

from collections.abc import Callable

import torch

SIZES = (64, 48, 32, 24, 17, 16, 13, 9, 8, 5, 4, 3, 2)  # rows that are tried when all rows are too many
PROBES = 8  # rows of different values; each is put in several places
SPREAD = 6  # the terms of a probe differ by up to two to the power of twice this, so that nearly all sums round

# Whether products of so many rows keep the order, by the kind of product.
_known: dict[tuple, bool] = {}


def rows_in_order(product: Callable, weight_OI: torch.Tensor, dims: int, rows: int, reference: int = 1) -> int:
    """The most rows, at most `rows`, that a product may have if each is to round as in a product of few rows.

    The result is 0 if even a product of `reference` rows rounds its rows in different ways.

    Args:
        product (`Callable`): Computes `(..., I)` to `(..., O)`, without a bias that differs from 0.
        weight_OI (`torch.Tensor` of shape `(O, I)`): Its weight, perhaps a transposed view.
        dims (`int`): Dimensions of the input: 2, or 3 with the rows in the second one.
        rows (`int`): Rows that are to be computed.
        reference (`int`, *optional*, defaults to 1): Rows of the product to compare with, in the first dimension.
    """
    place = tuple(weight_OI.shape), weight_OI.stride(), weight_OI.dtype, weight_OI.device
    kind = *place, dims, reference, torch.get_num_threads()
    probes = _Probes(product, weight_OI, dims, reference)
    for size in (rows, *(size for size in SIZES if size < rows)):
        if (*kind, size) not in _known:
            _known[(*kind, size)] = probes.keeps_order(size)
        if _known[(*kind, size)]:
            return size
    return 1 if reference == 1 else 0


class _Probes:
    """Rows whose dot products with some outputs' weights cancel out, and what the reference makes of them."""

    def __init__(self, product: Callable, weight_OI: torch.Tensor, dims: int, reference: int):
        self.product, self.weight_OI, self.dims, self.reference = product, weight_OI, dims, reference
        self.row_PI = self.expected_PO = None

    def keeps_order(self, rows: int) -> bool:
        """Whether a product of so many rows makes of every row what the reference does."""
        if self.row_PI is None:
            self.row_PI = _cancelling_rows(self.weight_OI)
            alike = [self.product(self._shaped(row.expand(self.reference, -1), 1)) for row in self.row_PI]
            alike_PmO = torch.stack([value.flatten(0, -2) for value in alike])
            self.expected_PO = alike_PmO[:, 0] if bool((alike_PmO == alike_PmO[:, :1]).all()) else None
        if self.expected_PO is None:
            return False
        for shift in range(3):
            probe_n = (torch.arange(rows, device=self.row_PI.device) + shift) % len(self.row_PI)
            found = self.product(self._shaped(self.row_PI[probe_n], 0)).flatten(0, -2)
            if not torch.equal(found, self.expected_PO[probe_n]):
                return False
        return True

    def _shaped(self, row_nI: torch.Tensor, dim: int) -> torch.Tensor:
        """The rows in the shape in which a layer gets them: `(1, n, I)` of a pass, or `(n, 1, I)` of a batch."""
        return row_nI.contiguous() if self.dims == 2 else row_nI.contiguous().unsqueeze(dim)


def _cancelling_rows(weight_OI: torch.Tensor) -> torch.Tensor:
    """`(P, I)`: rows that are exactly orthogonal to the weights of one output each, by pairs of features."""
    outputs, features = weight_OI.shape
    generator, rows = torch.Generator().manual_seed(0), []
    for output in torch.linspace(0, outputs - 1, PROBES).long().tolist():
        one, other = torch.randperm(features, generator=generator)[: features // 2 * 2].view(2, -1)
        scale = torch.exp2(torch.randint(-SPREAD, SPREAD + 1, one.shape, generator=generator).float())
        weight_I = weight_OI[output].float().cpu()
        row_I = torch.zeros(features)
        row_I[one], row_I[other] = weight_I[other] * scale, -weight_I[one] * scale
        rows.append(row_I)
    return torch.stack(rows).to(weight_OI.device, weight_OI.dtype)
