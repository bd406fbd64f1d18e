"""LoRA weights as decoding multiplies with them, prepared once per call of `generate`.

A pass of decoding reads few columns, so the cost of a LoRA lies in the number of operations rather than in their size.
Layers that read the same input share one product with their A. The result is added to the base's output in one more.

Knows LoRA layers, and which columns are masks. Knows nothing of the gate, or of how layers are called.

Shapes: B batch, N columns of which the last M are masks, D and E features of a layer's input and output, r rank of one
layer, R ranks of all layers that share an input.
"""

import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn


@dataclass
class SharedInput:
    """What layers with the same input have in common.

    Args:
        A_RD (`torch.Tensor` of shape `(R, D)`): The A of all of them, one below the other.
    """

    A_RD: torch.Tensor


@dataclass(frozen=True)
class LayerFactors:
    """The LoRA of one layer.

    Args:
        shared ([`SharedInput`]): Holds its A.
        start, rank (`int`): The rows of its A in there.
        B_1rE (`torch.Tensor` of shape `(1, r, E)`): Its B, transposed.
        scaling (`float`): What the product is multiplied by.
    """

    shared: SharedInput
    start: int
    rank: int
    B_1rE: torch.Tensor
    scaling: float


class PreparedLora:
    """The LoRA weights of one call of `generate`.

    Each layer's are prepared when a pass first calls it, so later changes of weights are not seen. That pass also
    shows which layers read the same tensor one after the other: query, key and value, say. Not for two threads at
    once, for gradients, or under autocast.
    """

    def __init__(self):
        self._factors: dict[tuple[LoraLayer, str], LayerFactors | None] = {}
        self._shared: SharedInput | None = None  # of the layer called last,
        self._input = lambda: None  # a reference to its input,
        self._low_BMR: torch.Tensor | None = None  # and the product of both

    def add(self, layer: LoraLayer, adapter: str, first: int, x_BND: torch.Tensor, y_BNE: torch.Tensor) -> bool:
        """Adds a LoRA to the masks of what the base's layer computed, unless it is more than two plain matrices.

        Args:
            layer ([`~peft.tuners.lora.LoraLayer`]): The layer.
            adapter (`str`): Name of the adapter.
            first (`int`): The first mask column.
            x_BND (`torch.Tensor` of shape `(B, N, D)`): Input of the base's layer.
            y_BNE (`torch.Tensor` of shape `(B, N, E)`): Its output, which is changed in place.

        Returns:
            Whether it was added.
        """
        key = layer, adapter
        if key not in self._factors:
            self._factors[key] = self._prepare(layer, adapter, x_BND, y_BNE)
        factors = self._factors[key]
        if factors is None:
            return False
        if x_BND is not self._input() or factors.shared is not self._shared:
            self._read(factors.shared, first, x_BND)
        low_BMr, B_BrE = self._low_BMR.narrow(2, factors.start, factors.rank), factors.B_1rE
        if x_BND.shape[0] > 1:
            B_BrE = B_BrE.expand(x_BND.shape[0], -1, -1)
        y_BME = y_BNE[:, first:]
        sum_BME = y_BME.to(B_BrE.dtype)  # itself if the dtype is the same
        sum_BME.baddbmm_(low_BMr, B_BrE, alpha=factors.scaling)
        if sum_BME is not y_BME:
            y_BME.copy_(sum_BME)
        return True

    def _read(self, shared: SharedInput, first: int, x_BND: torch.Tensor) -> None:
        """Multiplies the masks of an input with the A of all layers that share it."""
        # Contiguous, because torch would multiply a slice row by row of the batch.
        x_BMD = x_BND[:, first:].to(shared.A_RD.dtype).contiguous()
        self._low_BMR = F.linear(x_BMD, shared.A_RD)
        self._shared, self._input = shared, weakref.ref(x_BND)

    def _prepare(
        self, layer: LoraLayer, adapter: str, x_BND: torch.Tensor, y_BNE: torch.Tensor
    ) -> LayerFactors | None:
        """The factors of a layer, or `None` if it is not plain. Arguments are those of `add`."""
        A, B = layer.lora_A[adapter], layer.lora_B[adapter]
        if (
            torch.is_autocast_enabled(x_BND.device.type)
            or layer.training
            or B.bias is not None
            or not (_is_whole(A.weight) and _is_whole(B.weight))
        ):
            return None
        # On a CPU, a product of a few rows takes longer in half precision.
        dtype = torch.promote_types(y_BNE.dtype, torch.float32) if y_BNE.device.type == "cpu" else y_BNE.dtype
        A_rD = A.weight.detach().to(dtype)
        B_1rE, scaling = B.weight.detach().to(dtype).mT.contiguous()[None], layer.scaling[adapter]
        if x_BND is not self._input() or self._shared.A_RD.dtype != dtype:
            return LayerFactors(SharedInput(A_rD), 0, len(A_rD), B_1rE, scaling)
        shared, start = self._shared, len(self._shared.A_RD)
        shared.A_RD = torch.cat([shared.A_RD, A_rD])
        self._shared = None  # the product lacks the new rows
        return LayerFactors(shared, start, len(A_rD), B_1rE, scaling)


def _is_whole(weight: torch.Tensor) -> bool:
    """Whether a weight is there: ZeRO-3 leaves nothing until the layer is called, and offloading a shape."""
    return type(weight) is nn.Parameter and weight.dim() == 2 and not weight.is_meta
