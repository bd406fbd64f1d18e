"""Runs a block under its own seed, then restores torch's global random state."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_randomness(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Seeds torch's global random state, and restores it on exit.

    Args:
        model (`torch.nn.Module`): The devices of its parameters are seeded.
        seed (`int`): The seed.
    """
    devices = {parameter.device for parameter in model.parameters()}
    accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
    kind = accelerators[0].type if accelerators else "cuda"
    with torch.random.fork_rng([device.index or 0 for device in accelerators], device_type=kind):
        torch.manual_seed(seed)
        yield
