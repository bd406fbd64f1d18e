"""Gated LoRA on a base that already has adapters: the gated layers live in a separate module tree.

The existing adapters keep their layers and names, so users can still save, load, add, switch, merge and delete them.
They are part of the base and act on all tokens. The gated layers do not replace the base's layers. A hook on the
innermost layer adds their output, whatever happens to the adapters around that layer.

Shapes: as in `gate.py`.
"""

from functools import partial

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from .config import GatedLoraConfig
from .gate import Gate, add_to_masks, is_gated, ungated_layers

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


def refuse_layer_of_others(layer: nn.Module, name: str) -> None:
    """Raises if a layer that is to be gated has a LoRA of the user's own, which the gate would switch off.

    Args:
        layer (`torch.nn.Module`): A layer of a base that had no adapters when it was upgraded.
        name (`str`): The name of the layer in the base.

    Raises:
        ValueError: It has one.
    """
    if isinstance(layer, LoraLayer) and not is_gated(layer):
        raise ValueError(
            f"`{name}` has a LoRA of your own, which was added after the upgrade, so a further gated adapter cannot "
            "be added there. Upgrade the base, `model.base_model.model`, once more: it has all your adapters. Pass it "
            "to `PeftModel.from_pretrained` or `get_peft_model`."
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


def remove_layers(tree: nn.Module, layers: dict[str, LoraLayer]) -> None:
    """Puts back what gated layers wrap. Those beside the base wrap nothing.

    Args:
        tree (`torch.nn.Module`): Where the layers are.
        layers (`dict[str, LoraLayer]`): The layers by their names there.
    """
    for name, layer in reversed(layers.items()):  # the innermost first
        parent, _, child = name.rpartition(".")
        setattr(tree.get_submodule(parent), child, layer._modules.get("base_layer"))


def renamed(weights: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    """The same weights, with another beginning where their names have this one."""
    return {new + key.removeprefix(old) if key.startswith(old) else key: t for key, t in weights.items()}


def own_weights(state: dict[str, torch.Tensor], adapter_name: str, tuner: LoraModel) -> dict[str, torch.Tensor]:
    """Tensors of a gated adapter, without those of one of the base's own adapters that has the same name.

    Args:
        state (`dict[str, torch.Tensor]`): Tensors of the whole model by their names.
        adapter_name (`str`): The name of the gated adapter.
        tuner ([`~peft.tuners.lora.LoraModel`]): The tuner of the upgraded model.
    """
    own = {key: t for key, t in state.items() if f".{adapter_name}." in key}
    if tuner.is_stacked:
        return {key: t for key, t in own.items() if not key.startswith(IN_FILES)}
    modules = tuner.model.named_modules()
    gated = {f"{IN_FILES}{name}": is_gated(module) for name, module in modules if isinstance(module, BaseTunerLayer)}
    return {key: t for key, t in own.items() if _is_in_gated(key, gated)}


def _is_in_gated(key: str, gated: dict[str, bool]) -> bool:
    """Whether the innermost adapter layer that has a tensor is gated; also if none has it, as with heads of ours."""
    while key and key not in gated:
        key = key.rpartition(".")[0]
    return gated.get(key, True)


def with_file_names(weights: dict[str, torch.Tensor], tuner: LoraModel) -> dict[str, torch.Tensor]:
    """The weights under names that they have on a base without other adapters.

    Args:
        weights (`dict[str, torch.Tensor]`): Those of a gated adapter, under their names in the model.
        tuner ([`~peft.tuners.lora.LoraModel`]): The tuner of the upgraded model.
    """
    if tuner.is_stacked:
        return renamed(weights, IN_TREE, IN_FILES)
    for name in reversed(ungated_layers(tuner.model)):  # such as those of OFT, which are around ours
        weights = renamed(weights, f"{IN_FILES}{name}.base_layer.", f"{IN_FILES}{name}.")
    return weights


def with_model_names(weights: dict[str, torch.Tensor], tuner: LoraModel) -> dict[str, torch.Tensor]:
    """The inverse of [`with_file_names`]."""
    if tuner.is_stacked:
        return renamed(weights, IN_FILES, IN_TREE)
    for name in ungated_layers(tuner.model):
        weights = renamed(weights, f"{IN_FILES}{name}.", f"{IN_FILES}{name}.base_layer.")
    return weights
