"""Going backward part by part inside a forward pass, and handing the gradients to whoever calls `backward` later.

A part's graph is gone before the next part's is made. What comes out is an ordinary loss: scaling, accumulation and
the averaging of gradients over processes go on as they would.
"""

from collections.abc import Iterable, Sized

import torch
from torch import nn


class _Ready(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx, loss, gradients, *parameters):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, loss_gradient):
        return None, None, *(gradient.mul_(loss_gradient) for gradient in ctx.gradients)


class ChunkedBackward:
    """Adds up the gradients of a loss that is computed in parts.

    Args:
        parameters (`Iterable[torch.nn.Parameter]`): What gets gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.compiler.disable
    def through(self, loss: torch.Tensor) -> torch.Tensor:
        """Takes one part of the loss backward, and returns it without its graph."""
        if loss.requires_grad:  # a part without targets has no graph
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            for whole, gradient in zip(self.gradients, gradients, strict=True):
                if gradient is not None:
                    whole.add_(gradient)
        return loss.detach()

    def deliver(self, loss: torch.Tensor) -> torch.Tensor:
        """The whole loss, a scalar, whose `backward` gives the parameters what was added up."""
        return _Ready.apply(loss, self.gradients, *self.parameters)


def can_go_backward_in_chunks(model: nn.Module, parts: Sized) -> bool:
    """Whether gradients are wanted, in parts, and can be computed before the whole loss is known.

    Not in float16, whose gradients need the scale that the whole loss is multiplied by.
    """
    trainable = next((parameter for parameter in model.parameters() if parameter.requires_grad), None)
    if trainable is None or not torch.is_grad_enabled() or len(parts) == 1:
        return False
    device_type = trainable.device.type
    return not (torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) is torch.float16)
