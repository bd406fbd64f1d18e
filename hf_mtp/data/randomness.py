"""Chance of one's own: what is drawn within leaves what is drawn outside as it would have been."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_randomness(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Within, torch draws from `seed` on; afterwards it goes on where it was.

    Args:
        model (`torch.nn.Module`): Its devices are those that draw.
        seed (`int`): Where to start.
    """
    devices = {parameter.device for parameter in model.parameters()}
    accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
    kind = accelerators[0].type if accelerators else "cuda"
    with torch.random.fork_rng([device.index or 0 for device in accelerators], device_type=kind):
        torch.manual_seed(seed)
        yield
