"""Tensor operations that must run outside autocast."""

from collections.abc import Sequence

import torch


def concatenate(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """`torch.cat` without autocast: autocast to bfloat16 rejects float16 tensors."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return torch.cat(tensors, dim=dim)
