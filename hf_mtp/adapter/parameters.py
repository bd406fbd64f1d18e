"""The gate for parameters outside of linear layers, such as a tensor with the weights of all experts.

PEFT adds a LoRA to such a parameter for all inputs of its module. Here the module processes regular tokens with the
original parameter, and masks separately with the LoRA added. For this its input must have one row per column.

Shapes: B batch, N columns (regular tokens, then masks).
"""

import copy
from collections.abc import Callable

import torch
from peft.tuners.lora import layer as peft_layers
from torch import nn

from ..base.autocast import concatenate
from .config import refuse_ungated
from .gate import Gate, GateError, MaskColumns, refuse_merge


class ParamWrapper(peft_layers.ParamWrapper):
    """PEFT's LoRA on a parameter of a module, with the gate. PEFT looks for the name of this class.

    If several parameters of a module have a LoRA, the wrappers are nested, and the outermost one acts for all.
    """

    gate: Gate

    def forward(self, x: torch.Tensor, *args, **kwargs):
        self._check_forward_args(x, *args, **kwargs)  # refuses `adapter_names`, which the module does not know
        columns, module = self.gate.columns, self._beneath()
        wrappers = [] if columns is None or self.disable_adapters else self._wrappers_of(columns.adapter)
        if not wrappers:
            return module(x, *args, **kwargs)
        adapted = _with_weights(
            self.get_base_layer(), {w.parameter_name: w.adapted_weight(columns.adapter) for w in wrappers}
        )
        if columns.first == 0:
            return adapted(x, *args, **kwargs)
        regular, masks = (
            run(*(part(value) for value in (x, *args)), **{name: part(value) for name, value in kwargs.items()})
            for run, part in ((module, _Part(columns, masks=False)), (adapted, _Part(columns, masks=True)))
        )
        return _joined(regular, masks, columns)

    def adapted_weight(self, adapter: str) -> torch.Tensor:
        """The parameter with an adapter's LoRA added."""
        weight = self.get_param()
        if weight.device.type == "meta":
            raise GateError(
                f"`{self.parameter_name}` is offloaded until its module runs, but `target_parameters` needs it "
                "earlier. Keep it on a device (device_map), or leave out `target_parameters`."
            )
        return weight + self.get_delta_weight(adapter)

    def _beneath(self) -> nn.Module:
        """What is wrapped: the base's module, perhaps with a LoRA of the user's own on another parameter."""
        layer = self.base_layer
        while isinstance(layer, ParamWrapper):
            layer = layer.base_layer
        return layer

    def update_layer(self, adapter_name: str, *args, config, **kwargs) -> None:
        """Adds an adapter, which must be a gated one. Args are those of [`~peft.tuners.lora.layer.ParamWrapper`].

        Raises:
            ValueError: The adapter is an ordinary LoRA, added to an upgraded model.
        """
        refuse_ungated(adapter_name, config)
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def unload_and_optionally_merge_module(self, *args, **kwargs) -> "ParamWrapper":
        """What is left if a tuner of the user's own is unloaded: all but its LoRA on another parameter."""
        if isinstance(self.base_layer, peft_layers.ParamWrapper):
            self.base_layer = self.base_layer.unload_and_optionally_merge_module(*args, **kwargs)
        return self

    def _wrappers_of(self, adapter: str) -> "list[ParamWrapper]":
        """This wrapper and those within in which an adapter has weights."""
        wrappers, layer = [], self
        while isinstance(layer, ParamWrapper):
            wrappers.append(layer)
            layer = layer.base_layer
        return [wrapper for wrapper in wrappers if adapter in wrapper.lora_A]

    merge = refuse_merge


class _Part:
    """Takes of an argument what belongs to regular tokens, or to masks."""

    def __init__(self, columns: MaskColumns, masks: bool):
        self.shape = columns.shape
        self.wanted = slice(columns.first, None) if masks else slice(columns.first)

    def __call__(self, value):
        if isinstance(value, torch.Tensor):
            if value.shape[:2] == self.shape:
                return value[:, self.wanted]
            if value.shape[:1] == (self.shape[0] * self.shape[1],):
                return value.unflatten(0, self.shape)[:, self.wanted].flatten(0, 1)
        elif not isinstance(value, list | tuple | dict):
            return value
        what = f"of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise GateError(
            f"A module with `target_parameters` got an input {what}, but the forward pass has {self.shape[0]} rows of "
            f"{self.shape[1]} tokens: its input does not have one row per token (it may be a selection for an "
            "expert), so the gate cannot tell masks from regular tokens. Leave out `target_parameters`."
        )


def _joined(regular, masks, columns: MaskColumns):
    """What a module gives for regular tokens and for masks, as it would give it for all of them together."""
    if isinstance(regular, tuple):
        return tuple(_joined(*pair, columns) for pair in zip(regular, masks, strict=True))
    batch, length = columns.shape
    sizes = columns.first, length - columns.first
    if [part.shape[:2] for part in (regular, masks)] == [(batch, size) for size in sizes]:
        return concatenate([regular, masks], dim=1)
    parts = [part.unflatten(0, (batch, size)) for part, size in zip((regular, masks), sizes, strict=True)]
    return concatenate(parts, dim=1).flatten(0, 1)


def _with_weights(module: nn.Module, weights: dict[str, torch.Tensor]) -> Callable:
    """The same module with other weights, while other threads may run it with its own."""
    if torch.compiler.is_compiling():  # traces a module, but not a copy of one
        return lambda *args, **kwargs: torch.func.functional_call(module, weights, args, kwargs)
    twin = copy.copy(module)
    twin._parameters = {**module._parameters, **weights}
    twin.__dict__.pop("forward", None)  # a hook's, which runs the module itself
    return twin


def gate_parameter(wrapper: peft_layers.ParamWrapper, gate: Gate) -> None:
    """Puts PEFT's wrapper of a parameter behind the gate.

    Args:
        wrapper ([`~peft.tuners.lora.layer.ParamWrapper`]): What PEFT made.
        gate ([`Gate`]): The gate of the model.

    Raises:
        ValueError: The parameter is an embedding's, which masks never go through.
    """
    if isinstance(wrapper.get_base_layer(), nn.Embedding):
        raise ValueError(
            f"`target_parameters` names the `{wrapper.parameter_name}` of an embedding, but masks do not use the "
            "base's embeddings. Leave it out."
        )
    wrapper.__class__ = ParamWrapper  # which has no state of its own but the gate
    wrapper.gate = gate
