"""Several processes that share one model. Where each holds a part of the weights, all must run the same layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed
from peft.utils.integrations import gather_params_ctx
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from .inspection import weight_shape


@contextmanager
def whole_weight(layer: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The whole weight of a layer of which each process may hold a part. All processes must call this together.

    Args:
        layer ([`torch.nn.Module`]): A layer whose forward pass is not running.
    """
    with gather_params_ctx(layer.weight, modifier_rank=None):  # of ZeRO-3
        yield layer.weight.full_tensor() if hasattr(layer.weight, "full_tensor") else layer.weight


def whole_adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """State dict of the adapters of a model that FSDP2 shards. All processes must call this together.

    Args:
        model ([`torch.nn.Module`]): The upgraded model.
    """
    parts = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    return {name: part.full_tensor().cpu() if hasattr(part, "full_tensor") else part for name, part in parts.items()}


@torch.compiler.disable  # goes through all weights
def is_sharded(model: torch.nn.Module) -> bool:
    """Whether each process holds a part of the weights (FSDP, DeepSpeed ZeRO-3, tensor parallelism).

    If so, all processes must run the same layers in the same order, and the only backward pass is the one through the
    whole model.

    Args:
        model ([`torch.nn.Module`]): The model or a part of it. A forward pass may be running.
    """
    is_part = any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in model.parameters())
    return is_part or any(hasattr(m, "unshard") or is_fsdp_managed_module(m) for m in model.modules())


@torch.compiler.disable
def hold_in_forward(module: torch.nn.Module, layer: torch.nn.Module) -> None:
    """Under ZeRO-3, keeps the weights of a layer gathered during the whole forward pass of a module.

    Args:
        module ([`torch.nn.Module`]): The module, before its forward pass.
        layer ([`torch.nn.Module`]): A layer in it.
    """
    if any(hasattr(parameter, "ds_id") for parameter in layer.parameters()):
        import deepspeed

        for parameter in layer.parameters():
            deepspeed.zero.register_external_parameter(module, parameter)


def past_sharding(layer: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A frozen layer as a function that can be called and differentiated in the middle of a forward pass.

    It bypasses the hooks that gather the weights. FSDP2 mistakes any backward pass through one of its layers for the
    model's and reshards all weights at its end. ZeRO-3 gathers at every call, but processes differ in their calls.

    Args:
        layer ([`torch.nn.Module`]): The layer. Under ZeRO-3, [`hold_in_forward`] keeps its weights.
    """

    def call(features: torch.Tensor) -> torch.Tensor:
        if hasattr(layer, "unshard"):
            layer.unshard()  # until the model's own backward pass
        is_there = layer.weight.shape == weight_shape(layer)
        return layer.forward(features) if is_there else layer(features)

    return call if hasattr(layer, "unshard") or hasattr(layer.weight, "ds_id") else layer


def any_process_unfinished(model: torch.nn.Module, synced_gpus: bool | None) -> Callable[[bool], bool]:
    """A function that says whether to go on. Its argument says whether this process is done.

    Args:
        model ([`torch.nn.Module`]): The model, whose weights may be sharded over the processes.
        synced_gpus (`bool`, *optional*): As in `generate`. `None` means: if the weights are sharded.
    """
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if synced_gpus is None:
        synced_gpus = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    if not (synced_gpus and is_distributed and torch.distributed.get_world_size() > 1):
        return lambda is_done: not is_done

    def anyone_unfinished(is_done: bool) -> bool:
        unfinished = torch.tensor(0.0 if is_done else 1.0, device=model.device)
        torch.distributed.all_reduce(unfinished)
        return unfinished.item() > 0

    return anyone_unfinished


def agreed_seconds(model: torch.nn.Module) -> Callable[[float], float]:
    """A function that replaces a time measured here by the one that the first process measured.

    Processes that hold parts of the same weights must run the same passes, so all must decide by the same times.

    Args:
        model ([`torch.nn.Module`]): The base.
    """
    meshes = [p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")]  # of a DTensor
    if not meshes:
        return lambda seconds: seconds
    group, device = meshes[0].get_group(), model.device
    first = torch.distributed.get_process_group_ranks(group)[0]

    def agree(seconds: float) -> float:
        shared = torch.tensor([seconds], dtype=torch.float64, device=device)
        torch.distributed.broadcast(shared, src=first, group=group)
        return shared.item()

    return agree
