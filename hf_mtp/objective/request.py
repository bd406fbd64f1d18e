"""The caller's settings for one training step."""

from dataclasses import dataclass, field

import torch

from .recipe import Recipe


@dataclass(frozen=True)
class ObjectiveRequest:
    """Pass it to the upgraded model's forward pass as `mtp_objective`, which then returns an [`Objective`].

    Args:
        recipe ([`Recipe`]): Weights and targets of the losses.
        anchors (`int`, *optional*): Maximum number of blocks per row, sampled at random. `None`: one on every token.
        generator (`torch.Generator`, *optional*): Random generator for this sampling.
        total (`torch.Tensor`, a scalar, *optional*): Divisor of the loss: the weight of all masks in all batches whose
            gradients are accumulated. `None`: the weight of this batch.
        masks_per_part (`int`, *optional*, defaults to 1024): Number of masks that go forward and backward at a time.
    """

    recipe: Recipe = field(default_factory=Recipe)
    anchors: int | None = None
    generator: torch.Generator | None = None
    total: torch.Tensor | None = None
    masks_per_part: int = 1024
