"""What autocast should leave alone. Knows nothing of models."""

from collections.abc import Sequence

import torch


def concatenate(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """`torch.cat`, which autocast to bfloat16 refuses for float16."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return torch.cat(tensors, dim=dim)
