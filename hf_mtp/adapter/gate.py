"""The gate: LoRA acts on mask columns and on nothing else.

This module knows LoRA layers and the columns of the running forward pass. It knows nothing of losses or decoding.
Every forward pass puts regular tokens first and masks after them, so the gate is one column number, and what the
gate does is one slice: no index tensor, no synchronisation, no multiplication by zero (which would leak NaN and -0).

Shapes: B batch, N columns (regular tokens, then masks), D features.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate.utils import has_offloaded_params
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import refuse_ungated
from .prepared import PreparedLora


@dataclass(frozen=True)
class MaskColumns:
    """The columns of one forward pass that hold masks.

    Args:
        first (`int`): The first mask column. Columns before it hold regular tokens, this one and all after it masks.
        index (`torch.LongTensor` of shape `(B, M)`): Which mask, 0..k-1, stands in each of the M mask columns.
        adapter (`str`): The adapter whose mask embeddings and LoRA weights the masks use.
        lora ([`PreparedLora`], *optional*): Weights prepared for decoding, where these are to be used.
    """

    first: int
    index: torch.LongTensor
    adapter: str
    lora: PreparedLora | None = None

    @property
    def length(self) -> int:
        """N, columns of the whole forward pass. Every layer asks."""
        return self.first + self.index.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, N) of the whole forward pass, regular columns included."""
        return self.index.shape[0], self.length


class HiddenStateCapture:
    """Holds the last hidden states, `(B, N, D)`, of one forward pass."""

    states: torch.Tensor | None = None


class Gate(threading.local):
    """Tells every LoRA layer of one model which columns of the running forward pass are masks.

    State is per thread, so that two threads may generate from one model, and so that a layer that autograd runs again
    on a thread of its own (gradient checkpointing) sees the gate of *its* forward pass and not the latest one.
    """

    def __init__(self):  # runs once per thread; torch.compile wants the attributes to be there from the start
        self.columns: MaskColumns | None = None
        self.capture: HiddenStateCapture | None = None

    @contextmanager
    def capture_hidden_states(self) -> Iterator[HiddenStateCapture]:
        """Within, the capture gets the decoder's output: last hidden states, which the unembedding reads."""
        self.capture = HiddenStateCapture()
        try:
            yield self.capture
        finally:
            self.capture = None

    @contextmanager
    def open(self, columns: MaskColumns | None) -> Iterator[None]:
        """Opens the gate at `columns` (closes it for `None`) and restores it on exit, also when the body raises."""
        before, self.columns = self.columns, columns
        try:
            yield
        finally:
            self.columns = before

    def checkpoint_contexts(self):
        """`context_fn` of [`torch.utils.checkpoint.checkpoint`]: the recomputation sees the gate of the forward.

        Backward runs a checkpointed layer again long after `open` was left, perhaps after another forward pass.
        """
        return nullcontext(), self.open(self.columns)

    def __reduce__(self):
        # Per-thread state is not part of a copied or pickled model.
        return Gate, ()


class GateError(ValueError):
    """A gated layer cannot tell which rows of its input are masks."""


def refuse_adapter_names(adapter_names: list[str]) -> None:
    """Raises a `ValueError`: masks cannot belong to a different adapter in each row."""
    raise ValueError(
        f"`adapter_names={adapter_names!r}` chooses an adapter for each row, but all masks of an input belong to the "
        "active adapter. Leave it out, and choose the adapter with `set_adapter`."
    )


def refuse_merge(*args, **kwargs) -> None:
    """Replaces every method that would merge a gated LoRA.

    Raises:
        NotImplementedError: Always.
    """
    raise NotImplementedError(
        "A gated LoRA cannot be merged: it acts on mask tokens only, but a merged weight would also act on regular "
        "tokens and change the base model's output. Keep the adapter separate; `unload()` returns the unchanged "
        "base."
    )


class GatedVariant(LoraVariant):
    """A [`LoraVariant`] that lets the wrapped variant (or plain LoRA) see and change mask columns only.

    y = W x for regular tokens, y = W x + s B A x for masks (Samragh et al., arXiv 2507.11851, eq. 3).

    Args:
        gate ([`Gate`]): The gate of the model.
        inner ([`LoraVariant`], *optional*): A variant that PEFT chose for the layer, such as DoRA's. Plain LoRA if
            `None`.
    """

    def __init__(self, gate: Gate, inner: LoraVariant | None = None):
        self.gate = gate
        self.inner = inner

    def init(self, module: LoraLayer, adapter_name: str, **kwargs) -> None:
        if self.inner is not None:
            self.inner.init(module, adapter_name, **kwargs)

    def supports_lora_conversion(self) -> bool:
        return False

    def forward(self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs):
        columns = self.gate.columns
        if columns is None or columns.adapter != active_adapter:
            return result
        if result.requires_grad and result._is_view():  # of a quantized layer's own function, not to be written to
            result = result.clone()
        masks_x, masks_y = self._mask_rows(x, columns), self._mask_rows(result, columns)
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        if masks_x.dtype != lora_A.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            masks_x = masks_x.to(lora_A.weight.dtype)
        if self.inner is not None:
            refuse_offloaded_dora(module, active_adapter, "a layer")
            masks_y.copy_(self.inner.forward(module, active_adapter=active_adapter, x=masks_x, result=masks_y.clone()))
            return result
        if module.training:
            masks_x = module.lora_dropout[active_adapter](masks_x)
        masks_y.add_(lora_B(lora_A(masks_x) * module.scaling[active_adapter]))  # scaled where it is small
        return result

    @staticmethod
    def _mask_rows(x: torch.Tensor, columns: MaskColumns) -> torch.Tensor:
        """The mask rows of `(B, N, D)`, or of `(B * N, D)` as mixture-of-experts layers pass it: a view of `x`."""
        if x.dim() == 3 and x.shape[1] == columns.length:  # by far the usual case
            # Training reads masks alone. Autograd copies what is written to through a view, of whatever size.
            return x[:, columns.first :] if columns.first else x
        batch, length = columns.shape
        if x.dim() == 2 and x.shape[0] == batch * length:
            x = x.view(batch, length, -1)
        if x.dim() != 3 or x.shape[1] != length:
            raise GateError(
                f"A gated LoRA layer got an input of shape {tuple(x.shape)}, but the forward pass has {batch} rows of "
                f"{length} tokens: the layer sees a selection of tokens (as an expert does), so the gate cannot tell "
                "masks from regular tokens. Exclude it: GatedLoraConfig(exclude_modules=...)."
            )
        return x[:, columns.first :]

    merge_safe = merge_unsafe = unmerge = refuse_merge


def is_gated(layer: nn.Module) -> bool:
    """Whether a module is a LoRA layer of a gated adapter."""
    if not isinstance(layer, LoraLayer):
        return False
    return hasattr(layer, "gate") or any(isinstance(variant, GatedVariant) for variant in layer.lora_variant.values())


def ungated_layers(base: nn.Module) -> list[str]:
    """Names of the layers of a base with adapters of the user's own, which act on all tokens."""
    layers = [(name, layer) for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)]
    return [name for name, layer in layers if not is_gated(layer)]


def refuse_offloaded_dora(layer: LoraLayer, adapter_name: str, name: str) -> None:
    """Raises [`GateError`] for DoRA over a base layer whose weights are there only while that layer runs.

    Args:
        layer ([`~peft.tuners.lora.LoraLayer`]): The layer.
        adapter_name (`str`): Name of the adapter.
        name (`str`): What the error calls the layer.
    """
    if adapter_name in layer.lora_magnitude_vector and has_offloaded_params(layer.get_base_layer()):
        raise GateError(
            f"The adapter uses DoRA, which computes with the base's own weights, but those of {name} are offloaded to "
            "the CPU or to disk. Keep the layers on a device (`device_map`), or train an adapter with use_dora=False."
        )


def add_to_masks(layer: LoraLayer, columns: MaskColumns, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Adds a LoRA to the mask columns of what the base's layer computed, by prepared weights if the pass has these.

    Args:
        layer ([`~peft.tuners.lora.LoraLayer`]): A gated layer.
        columns ([`MaskColumns`]): Those of the running forward pass.
        x (`torch.Tensor` of shape `(B, N, D)` or `(B * N, D)`): Input of the base's layer.
        result (`torch.Tensor`): Its output, which may be written to.
    """
    variant = layer.lora_variant.get(columns.adapter)
    if variant is None:
        return result
    lora = columns.lora
    if lora is not None and variant.inner is None and x.dim() == 3 and x.shape[1] == columns.length:
        if lora.add(layer, columns.adapter, columns.first, x, result):
            return result
    return variant.forward(layer, columns.adapter, x, result)


class GatedLinear(Linear):
    """PEFT's LoRA over an ordinary linear layer. What it computes is PEFT's, by the short way."""

    gate: Gate

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if args or kwargs or self._disable_adapters:
            if "adapter_names" in kwargs and self.gate.columns is not None:
                refuse_adapter_names(kwargs["adapter_names"])
            return super().forward(x, *args, **kwargs)
        base = self._modules["base_layer"]
        has_hooks = base._forward_hooks or base._forward_pre_hooks
        result = base(x) if has_hooks else base.forward(x)
        columns = self.gate.columns
        return result if columns is None else add_to_masks(self, columns, x, result)

    def update_layer(self, adapter_name: str, r: int, *args, config, **kwargs) -> None:
        """Adds an adapter, which must be a gated one, or gives it weights of another rank, as EVA does.

        Args are those of [`~peft.tuners.lora.Linear`].

        Raises:
            ValueError: The adapter is an ordinary LoRA, added to an upgraded model.
        """
        refuse_ungated(adapter_name, config)
        gate = self.lora_variant.pop(adapter_name, None)  # so that PEFT chooses and initializes what it wraps
        super().update_layer(adapter_name, r, *args, config=config, **kwargs)
        if gate is not None:
            self.lora_variant[adapter_name] = GatedVariant(self.gate, inner=self.lora_variant.get(adapter_name))

    def unload_and_optionally_merge_module(self, *args, **kwargs) -> "GatedLinear":
        """What is left if a tuner of the user's own, with adapters on other layers, is unloaded: this layer."""
        return self


def gate_lora_layer(layer: LoraLayer, adapter_name: str, gate: Gate, name: str) -> None:
    """Adds the gate to one of PEFT's LoRA layers.

    Args:
        layer ([`~peft.tuners.lora.LoraLayer`]): The layer that PEFT made.
        adapter_name (`str`): The adapter to gate.
        gate ([`Gate`]): The gate of the model.
        name (`str`): The name of the layer in the model, for the error.

    Raises:
        ValueError: The layer class applies its LoRA without asking for a variant (AWQ, AQLM, EETQ, INC and
            TransformerEngine layers do, in silence), or is not a linear layer.
    """
    asks = isinstance(layer, GatedLinear) or "lora_variant" in type(layer).forward.__code__.co_names
    if not asks or adapter_name not in layer.lora_A:
        raise ValueError(
            f"`{name}` became a PEFT layer of type {type(layer).__module__}.{type(layer).__name__}, which cannot be "
            "gated: its LoRA would act on regular tokens as well and change the base model's output. Target linear "
            "layers only (`target_modules='all-linear'`), or load the base with another quantization method."
        )
    refuse_offloaded_dora(layer, adapter_name, f"`{name}`")
    if type(layer) is Linear:
        layer.__class__ = GatedLinear  # which only adds a way through
    if isinstance(layer, GatedLinear):
        layer.gate = gate
    # PEFT would cast every token to the dtype of the LoRA weights; the variant does so for masks only.
    layer.cast_input_dtype_enabled = False
    inner = layer.lora_variant.get(adapter_name)
    if not isinstance(inner, GatedVariant):  # else the adapter was there, and has new weights now
        layer.lora_variant[adapter_name] = GatedVariant(gate, inner=inner)
