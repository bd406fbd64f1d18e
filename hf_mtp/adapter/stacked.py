"""Gated LoRA on a base that already has adapters: the gated layers live in a separate module tree.

The existing adapters keep their layers and names, so users can still save, load, add, switch, merge and delete them.
They are part of the base and act on all tokens. The gated layers do not replace the base's layers. A hook on the
innermost layer adds their output, whatever happens to the adapters around that layer.

Shapes: as in `gate.py`.
"""

from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from .config import GatedLoraConfig
from .gate import Gate, add_to_masks, ungated_layers

TREE = "lora_layers"  # the tuner's attribute that holds the layers
IN_FILES, IN_TREE = "base_model.model.", f"base_model.{TREE}."  # files name all layers by their place in the base


def has_adapters(model: nn.Module) -> bool:
    """Whether a model already has adapter layers, from the user or from an earlier upgrade."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def refuse_parameters(config: GatedLoraConfig) -> None:
    """Raises if an adapter targets parameters: their modules must be wrapped in place.

    Raises:
        ValueError: It does.
    """
    if config.target_parameters:
        raise ValueError(
            f"`target_parameters={config.target_parameters!r}` needs a base without adapters, but this base already "
            "has adapters. Leave out `target_parameters`, or merge or `unload()` those adapters first."
        )


def innermost(layer: nn.Module) -> nn.Module:
    """The base's own layer, beneath all adapters."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def branch(tree: nn.Module, name: str) -> nn.Module:
    """The module in a tree that has the name of one in the base; made if it is missing."""
    for part in name.split(".") if name else ():
        if part not in tree._modules:
            tree.add_module(part, nn.Module())
        tree = tree._modules[part]
    return tree


def run_beside(layer: LoraLayer, gate: Gate) -> RemovableHandle:
    """Adds a gated layer's LoRA to all that the base's layer computes.

    Args:
        layer ([`~peft.tuners.lora.LoraLayer`]): The gated layer, which from now on only refers to its base layer.
        gate ([`Gate`]): The gate of the model.

    Returns:
        A handle that removes the LoRA again.
    """
    base = layer._modules.pop("base_layer")
    layer.__dict__["base_layer"] = base
    return base.register_forward_hook(partial(_add, layer, gate))


def _add(layer: LoraLayer, gate: Gate, base: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    columns = gate.columns
    return None if columns is None or layer.disable_adapters else add_to_masks(layer, columns, args[0], output)


def renamed(weights: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    """The same weights, with another beginning where their names have this one."""
    return {new + key.removeprefix(old) if key.startswith(old) else key: t for key, t in weights.items()}


def own_weights(
    state: dict[str, torch.Tensor], adapter_name: str, base: nn.Module, is_stacked: bool
) -> dict[str, torch.Tensor]:
    """Tensors of a gated adapter, without those of one of the base's own adapters that has the same name.

    Args:
        state (`dict[str, torch.Tensor]`): Tensors of the whole model by their names.
        adapter_name (`str`): The name of the gated adapter.
        base ([`~transformers.PreTrainedModel`]): The base.
        is_stacked (`bool`): Whether the gated layers are beside the base, and not in it.
    """
    others = (IN_FILES,) if is_stacked else tuple(f"{IN_FILES}{name}." for name in ungated_layers(base))
    return {key: t for key, t in state.items() if f".{adapter_name}." in key and not key.startswith(others)}
