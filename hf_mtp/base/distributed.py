"""Helpers for several processes that share one model. Processes that shard its weights must run the same layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast, gather
from peft.utils.integrations import gather_params_ctx
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from .inspection import weight_shape


@contextmanager
def whole_weight(layer: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Gathers the whole weight of a layer that may be sharded. All processes must call this together.

    Do not call it while the layer's forward pass runs.
    """
    with gather_params_ctx(layer.weight, modifier_rank=None):  # ZeRO-3
        yield layer.weight.full_tensor() if hasattr(layer.weight, "full_tensor") else layer.weight


def whole_adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gathers the adapters of an upgraded model that FSDP2 shards. All processes must call this together."""
    parts = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    return {name: part.full_tensor().cpu() if hasattr(part, "full_tensor") else part for name, part in parts.items()}


@torch.compiler.disable  # loops over all weights
def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the weights are sharded over processes (FSDP, DeepSpeed ZeRO-3, tensor parallelism).

    If so, all processes must run the same layers in the same order, and the only backward pass is the one through the
    whole model.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False  # looping over all weights in every step takes a tenth of a second
    is_part = any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in model.parameters())
    return is_part or any(hasattr(m, "unshard") or is_fsdp_managed_module(m) for m in model.modules())


@torch.compiler.disable
def hold_in_forward(module: torch.nn.Module, layer: torch.nn.Module) -> None:
    """Under ZeRO-3, keeps a layer's weights gathered during the module's next forward pass."""
    if any(hasattr(parameter, "ds_id") for parameter in layer.parameters()):
        import deepspeed

        for parameter in layer.parameters():
            deepspeed.zero.register_external_parameter(module, parameter)


def past_sharding(layer: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Wraps a frozen layer so that it can be called and differentiated in the middle of a forward pass.

    The wrapper bypasses the hooks that gather the weights. FSDP2 takes any backward pass through one of its layers for
    the model's, and reshards all weights at its end. ZeRO-3 gathers at every call, but processes differ in their
    calls. So [`hold_in_forward`] must keep the layer's weights there.
    """

    def call(features: torch.Tensor) -> torch.Tensor:
        if hasattr(layer, "unshard"):
            layer.unshard()  # until the model's own backward pass
        is_gathered = layer.weight.shape == weight_shape(layer)
        return layer.forward(features) if is_gathered else layer(features)

    return call if hasattr(layer, "unshard") or hasattr(layer.weight, "ds_id") else layer


def any_process_unfinished(model: torch.nn.Module, synced_gpus: bool | None) -> Callable[[bool], bool]:
    """Makes a function that maps "this process is done" to "some process is not".

    Args:
        model ([`torch.nn.Module`]): The model.
        synced_gpus (`bool`, *optional*): As in `generate`. If `None`, processes are synchronised where they shard the
            weights.
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


def in_first_process(value: float, device: torch.device) -> float:
    """A number as the first process has it. All processes must call this together."""
    if PartialState().num_processes == 1:
        return value
    return broadcast(torch.tensor(value, device=device)).item()


def in_any_process(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set in some process. All processes must call this together."""
    if PartialState().num_processes == 1:
        return flag
    return bool(gather(torch.tensor([float(flag)], device=device)).any())


def agreed_seconds(model: torch.nn.Module) -> Callable[[float], float]:
    """Makes a function that replaces a time measured in this process by the first process's.

    Processes that shard the base's weights must run the same passes, so all must decide by the same times.
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
