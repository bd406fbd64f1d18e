"""Seeds torch's global random state for a block, and restores it afterwards.

`generate` samples from the global state. [`~hf_mtp.base.randomness.own_randomness`] leaves that state alone, but it
intercepts every operation in Python, so it is for short runs only.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fork_rng(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """[`torch.random.fork_rng`] for the devices of a model, with a seed.

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
