"""What a caller asks of one training step."""

from dataclasses import dataclass, field

import torch

from .recipe import Recipe


@dataclass(frozen=True)
class ObjectiveRequest:
    """Passed to the upgraded model's forward pass as `mtp_objective`, which then returns an [`Objective`].

    Args:
        recipe ([`Recipe`]): Weights and targets of the losses.
        anchors (`int`, *optional*): Blocks per row at most, drawn at random. A block on every token if `None`.
        generator (`torch.Generator`, *optional*): Source of that draw.
        total (`torch.Tensor`, a scalar, *optional*): What the loss is divided by: the weight of all masks of all
            batches whose gradients are added up. That of this batch if `None`.
        masks_per_part (`int`, *optional*, defaults to 1024): Masks that go forward and backward at a time.
    """

    recipe: Recipe = field(default_factory=Recipe)
    anchors: int | None = None
    generator: torch.Generator | None = None
    total: torch.Tensor | None = None
    masks_per_part: int = 1024
