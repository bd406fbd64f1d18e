"""Processes that decode side by side and must run the same number of forward passes (FSDP, DeepSpeed ZeRO-3)."""

from collections.abc import Callable

import torch
import torch.distributed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module


def weights_are_sharded(model: torch.nn.Module) -> bool:
    """Whether each process holds a part of the weights only, so that all must take part in every forward pass.

    Args:
        model ([`torch.nn.Module`]): The model.
    """
    parts = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())  # of a DTensor
    return parts or is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)


def peers_unfinished(model: torch.nn.Module, synced_gpus: bool | None) -> Callable[[bool], bool]:
    """A function that tells whether to go on, told whether this process is done.

    Args:
        model ([`torch.nn.Module`]): The model, whose weights may be sharded over the processes.
        synced_gpus (`bool`, *optional*): As `generate` takes it. `None`: if the weights are sharded.
    """
    there_are_peers = torch.distributed.is_available() and torch.distributed.is_initialized()
    if synced_gpus is None:
        synced_gpus = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    if not (synced_gpus and there_are_peers and torch.distributed.get_world_size() > 1):
        return lambda is_done: not is_done

    def anyone_unfinished(is_done: bool) -> bool:
        unfinished = torch.tensor(0.0 if is_done else 1.0, device=model.device)
        torch.distributed.all_reduce(unfinished)
        return unfinished.item() > 0

    return anyone_unfinished


def agreed_seconds(model: torch.nn.Module) -> Callable[[float], float]:
    """What a pass costs by the clock of one process, for all that hold parts of the same weights.

    They must run the same passes, and so decide alike what pays.

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
