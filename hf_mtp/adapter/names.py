"""Names of adapters: any that cannot be taken for another part of a weight's name.

PEFT finds the weights of an adapter by its name, and removes the name from them when it saves. Of an adapter with the
name `layers`, it would write the weights of all adapters; of one with the name `0`, two weights under one name.
"""

import torch
from torch import nn

from .sampler import SamplerHead


def refuse_adapter_name(name: str, model: nn.Module) -> None:
    """Raises for a name with which an adapter could not be saved and loaded again.

    Args:
        name (`str`): Name of a new adapter.
        model ([`~transformers.PreTrainedModel`]): The base.

    Raises:
        ValueError: It is empty, has a dot, or is the name of a module or parameter.
    """
    with torch.device("meta"):
        head = SamplerHead(1, 1, recurrent=True)
    if not name or "." in name or name.startswith("lora_") or name in _parts(model) | _parts(head):
        raise ValueError(
            f"The adapter cannot have the name {name!r}: names must not be empty, contain a dot, begin with 'lora_' "
            "or be those of a module or parameter of the model, because weights could not be told apart in the file. "
            "Choose another `adapter_name`, such as 'mtp'."
        )


def _parts(model: nn.Module) -> set[str]:
    """The parts of the names of all weights. What a dict of modules has as keys are names of adapters themselves."""
    modules = [module for module in model.modules() if not isinstance(module, nn.ModuleDict | nn.ParameterDict)]
    return {part for module in modules for part in (*module._modules, *module._parameters)}
