"""Runs the backward pass of a loss in chunks inside the forward pass, and hands out the gradients later.

Only one chunk's graph exists at a time. The result behaves like an ordinary loss, so that gradient scaling,
accumulation and averaging over processes work as usual. Knows nothing of what the loss is.
"""

from collections.abc import Iterable, Sized

import torch
from torch import nn


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients were computed in the forward pass."""

    @staticmethod
    def forward(ctx, loss, gradients, *parameters):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, loss_gradient):
        return None, None, *(gradient.mul_(loss_gradient) for gradient in ctx.gradients)


class ChunkedBackward:
    """Sums the gradients of a loss that is computed in chunks.

    Args:
        parameters (`Iterable[torch.nn.Parameter]`): Parameters that get gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.compiler.disable
    def accumulate(self, chunk_loss: torch.Tensor) -> torch.Tensor:
        """Adds the gradients of one chunk's loss to the sum, and returns that loss without its graph."""
        if chunk_loss.requires_grad:  # a chunk without targets has no graph
            gradients = torch.autograd.grad(chunk_loss, self.parameters, allow_unused=True)
            for total, gradient in zip(self.gradients, gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient)
        return chunk_loss.detach()

    def with_gradients(self, loss: torch.Tensor) -> torch.Tensor:
        """The total loss, a scalar, whose `backward` gives the parameters the summed gradients."""
        return _KnownGradients.apply(loss, self.gradients, *self.parameters)


def can_go_backward_in_chunks(model: nn.Module, chunks: Sized) -> bool:
    """Whether there are gradients to compute, in several chunks, before the total loss is known.

    Not in float16: its gradients need the scale by which the total loss is multiplied.
    """
    trainable = next((parameter for parameter in model.parameters() if parameter.requires_grad), None)
    if trainable is None or not torch.is_grad_enabled() or len(chunks) == 1:
        return False
    device_type = trainable.device.type
    return not (torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) is torch.float16)
