"""Finds the linear layers that can have a gated LoRA: their input has one row for each column of the forward pass.

Other layers read a selection of tokens (experts of a mixture), the whole cache (latents that are expanded to keys and
values) or only the last column (a head), or the model uses their weight without calling them. A LoRA in such a layer
could not tell masks from regular tokens, or would have no effect.
"""

import inspect
import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .caches import cache_name
from .inspection import accepted_inputs, evaluation_mode, input_device, weight_shape

logger = logging.get_logger(__name__)

# The second pass continues the first. No selection of tokens has these sizes by chance in both passes.
ROWS, PASSES = 2, (7, 5)


def exclude_layers_out_of_reach(
    exclude_modules: list[str] | str | None, model: PreTrainedModel
) -> list[str] | str | None:
    """Adds the layers that cannot have a gated LoRA to `exclude_modules`, which is as in [`~peft.LoraConfig`].

    Raises:
        ValueError: No layer can have one.
    """
    unserved = layers_out_of_reach(model)
    if unserved and len(unserved) == len(linear_layers(model)):
        raise ValueError(
            f"{type(model).__name__} cannot be upgraded: a gated LoRA needs linear layers whose input has one row "
            "per token, but this model has none."
        )
    names = shortened(unserved, model)
    if not names:
        return exclude_modules
    logger.info("No gated LoRA for %s: their inputs do not have one row per column", ", ".join(names))
    if isinstance(exclude_modules, str):
        return "|".join([f"(?:{exclude_modules})", *(rf"(?:.*\.)?{re.escape(name)}" for name in names)])
    return sorted({*(exclude_modules or ()), *names})


def refuse_layers_out_of_reach(config: LoraConfig, model: PreTrainedModel) -> None:
    """Raises if an adapter targets layers that cannot have a gated LoRA.

    Raises:
        ValueError: A target does not read one row per column of the model's input, or is the unembedding.
    """
    if not config.target_modules:
        return
    heads = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    refused = [name for name in heads | layers_out_of_reach(model) if check_target_module_exists(config, name)]
    if refused:
        raise ValueError(
            f"`target_modules={config.target_modules!r}` includes {', '.join(shortened(set(refused), model))}, whose "
            "input does not have one row per token of the model's input, so the gate cannot tell masks from regular "
            "tokens. Leave these layers out, or use target_modules='all-linear'."
        )


@torch.no_grad()
def layers_out_of_reach(model: PreTrainedModel) -> set[str]:
    """Finds the linear layers that cannot have a gated LoRA by two short forward passes.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.

    Returns:
        `set[str]`: Their names. It is empty if the model has no weights or cannot run; then the gate raises an error
        at the first such layer.
    """
    is_offloaded = bool(getattr(model, "hf_device_map", None))  # then weights are loaded when needed
    if not is_offloaded and any(parameter.device.type == "meta" for parameter in model.parameters()):
        return set()
    layers = linear_layers(model)
    served = defaultdict(list)  # for each call of a layer, whether the input had one row per column
    columns = 0

    def record(name: str, layer: nn.Module, args: tuple, output) -> None:
        shape = args[0].shape if args else ()
        in_columns = shape[:-1] in ((ROWS, columns), (ROWS * columns,))
        served[name].append(in_columns and isinstance(output, torch.Tensor))

    hooks = [
        layer.register_forward_hook(lambda *call, name=name: record(name, *call)) for name, layer in layers.items()
    ]
    known, outputs = inspect.signature(model.forward).parameters, {}
    try:
        for number, columns in enumerate(PASSES):
            ids = torch.arange(1, ROWS * columns + 1, device=input_device(model)).view(ROWS, columns)
            inputs = {"input_ids": ids % weight_shape(model.get_input_embeddings())[0], "use_cache": True}
            inputs["logits_to_keep"] = 1
            if number:
                inputs[cache_name(known)] = outputs[cache_name(outputs)]
            with evaluation_mode(model):
                outputs = model(**accepted_inputs(inputs, known))
    except Exception as error:  # a model's code may raise anything; calls before the error count
        logger.debug("%s could not be run in full: %s", type(model).__name__, error)
        if not served:
            return set()
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name in layers if not served[name] or not all(served[name])}


def shortened(names: set[str], model: nn.Module) -> list[str]:
    """Shortens names to their last part, if all layers that end in it are among them."""
    by_end = defaultdict(set)
    for name in linear_layers(model):
        by_end[name.rpartition(".")[2]].add(name)
    ends = {end for end, layers in by_end.items() if layers <= names}
    return sorted(ends | {name for name in names if name.rpartition(".")[2] not in ends})


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The base's linear layers by name, except the unembedding. Adapters' own layers are left out."""
    layers, inside, unembedding = {}, (), model.get_output_embeddings()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        inside = (f"{name}.",) if isinstance(module, BaseTunerLayer) else inside
        if isinstance(module, ParamWrapper):  # wraps a parameter, not a linear layer
            continue
        if (hasattr(module, "in_features") or isinstance(module, Conv1D)) and module is not unembedding:
            layers[name] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return layers


def lora_weights(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The weights that LoRA layers add to those that they wrap."""
    return [p for layer in layers for name, p in layer.named_parameters() if not name.startswith("base_layer.")]
