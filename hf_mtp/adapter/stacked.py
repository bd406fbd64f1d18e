"""A user's own adapter beneath the gated one: part of the base, active for all tokens, and not ours to switch.

A gated layer wraps the user's layer whole, so that both keep their own names, weights and switches.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .gate import GatedVariant
from .parameters import ParamWrapper


class UsersLayer(nn.Module, BaseTunerLayer):
    """Stands between a gated layer and a layer of the user's own adapter, which PEFT would else take for the same.

    Args:
        base_layer ([`~peft.tuners.tuners_utils.BaseTunerLayer`]): The user's layer.
    """

    def __init__(self, base_layer: BaseTunerLayer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return self.base_layer(*args, **kwargs)


def is_gated(layer: nn.Module) -> bool:
    """Whether a layer belongs to a gated adapter."""
    if isinstance(layer, ParamWrapper):
        return True
    return isinstance(layer, LoraLayer) and any(isinstance(v, GatedVariant) for v in layer.lora_variant.values())


def users_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """Layers of the user's own adapters, by the name that each has, or would have without a gated layer around it."""
    return {
        name.removesuffix(".base_layer.base_layer") if ".base_layer.base_layer" in name else name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, UsersLayer) and not is_gated(module)
    }


def refuse_name(adapter_name: str, layers: dict[str, BaseTunerLayer]) -> None:
    """Raises if an adapter of the user's own has this name, by which their weights could not be told apart.

    Raises:
        ValueError: It has.
    """
    if any(adapter_name in layer._get_available_adapters() for layer in layers.values()):
        raise ValueError(
            f"The base has an adapter named {adapter_name!r} of its own. Give the gated one another name: "
            "get_peft_model(model, GatedLoraConfig(...), adapter_name='mtp')."
        )


def refuse_parameter(layer: BaseTunerLayer, parameter_name: str | None) -> None:
    """Raises if a parameter is to be targeted whose module has an adapter of the user's own.

    Raises:
        ValueError: It is: both would add to the module's weights while it runs, ours for masks only.
    """
    if parameter_name is not None:
        raise ValueError(
            f"`target_parameters` names {parameter_name!r}, but its module already has an adapter of its own "
            f"({type(layer).__name__}). Leave it out, or merge that adapter first."
        )


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Within, PEFT may switch adapters in all layers that it finds; afterwards the user's are as they were before."""
    before = [
        (layer, list(layer.active_adapters), layer.disable_adapters, {p: p.requires_grad for p in layer.parameters()})
        for layer in users_layers(model).values()
    ]
    yield
    for layer, active, disabled, trainable in before:
        layer.set_adapter(active)
        layer.enable_adapters(not disabled)
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)


def restore(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Puts layers back in the places that they are named after."""
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
