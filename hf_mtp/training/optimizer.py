"""Muon for the LoRA matrices, AdamW for the rest.

Muon takes matrices only and gives all directions of an update the same length (Jordan et al., 2024,
kellerjordan.github.io/posts/muon). An adapter has hundreds of small matrices of a few shapes. `torch.optim.Muon` takes
them one by one, which keeps a GPU waiting; here those of one shape go together.

Shapes: N matrices, each of R rows and C columns.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from transformers import Trainer

from .config import MTPConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, its updates scaled to the size of AdamW's. Computes as `torch.optim.Muon` does.

    Args:
        params (`Iterable[torch.nn.Parameter]`): Matrices.
        lr (`float`): Learning rate.
        weight_decay (`float`, *optional*, defaults to 0): Decoupled, as in AdamW.
        momentum (`float`, *optional*, defaults to 0.95): Share of the old gradients.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for matrices in by_shape.values():
                self._update(matrices, group["lr"], group["weight_decay"], group["momentum"])
        return loss

    def _update(self, matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float) -> None:
        gradients = [matrix.grad for matrix in matrices]
        averages = [self._average(matrix) for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        update_NRC = orthogonalized(torch.stack(torch._foreach_lerp(gradients, averages, momentum)))
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        size = 0.2 * max(matrices[0].shape) ** 0.5  # the root mean square of AdamW's updates
        torch._foreach_add_(matrices, list(update_NRC.to(matrices[0].dtype).unbind()), alpha=-lr * size)

    def _average(self, matrix: nn.Parameter) -> torch.Tensor:
        """The moving average of a matrix's gradients."""
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]


def orthogonalized(matrix_NRC: torch.Tensor) -> torch.Tensor:
    """`(N, R, C)` in bfloat16: each matrix with all of its singular values near 1, by Newton-Schulz iteration.

    Args:
        matrix_NRC (`torch.Tensor` of shape `(N, R, C)`): The matrices.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix_NRC.shape[1] > matrix_NRC.shape[2]
    x = (matrix_NRC.mT if is_tall else matrix_NRC).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Two optimizers that step as one.

    Args:
        model ([`torch.nn.Module`]): Its trainable parameters are optimized, LoRA's A and B by Muon, others by AdamW.
        lr (`float`): AdamW's learning rate.
        muon_lr (`float`): Muon's learning rate. Its updates are scaled to the size of AdamW's.
        weight_decay (`float`): Of both.
        betas (`tuple[float, float]`), eps (`float`): AdamW's.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        muon_lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        is_matrix = [p.dim() == 2 and (".lora_A." in name or ".lora_B." in name) for name, p in trainable]
        matrices = [p for (_, p), matrix in zip(trainable, is_matrix, strict=True) if matrix]
        others = [p for (_, p), matrix in zip(trainable, is_matrix, strict=True) if not matrix]
        self.parts = [  # AdamW first: the first group's learning rate, the one asked for, is the one that is logged
            torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=True),
            Muon(matrices, lr=muon_lr, weight_decay=weight_decay),
        ]
        super().__init__([{"params": others}, {"params": matrices}], {"lr": lr})
        # The very groups of the parts, so that a schedule that sets `lr` here sets it there.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def takes_muon(trainer: Trainer) -> bool:
    """Whether no other optimizer was asked for, and matrices are whole."""
    args, default = trainer.args, MTPConfig.__dataclass_fields__["optim"].default
    given = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
    is_sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return args.muon and not given and args.optim == default and not is_sharded and hasattr(torch.optim, "Muon")


def make_muon_adamw():
    """What [`~transformers.Trainer`] takes as an optimizer that needs the whole model."""
    return MuonAdamW


def refuse_another_optimizer(checkpoint: str, there: bool | None, here: bool) -> None:
    """Raises if one training has Muon and the other has not: the state of one optimizer means nothing to the other.

    Args:
        checkpoint (`str`): Its name.
        there (`bool`, *optional*): Whether Muon trained the checkpoint, if that is known.
        here (`bool`): Whether it trains here.

    Raises:
        ValueError: They differ.
    """
    if there in (None, here):
        return
    same = "`muon=True`, with neither FSDP nor DeepSpeed" if there else "`muon=False`"
    raise ValueError(
        f"{checkpoint} was trained {'by Muon' if there else 'without Muon'}, and this training is "
        f"{'by Muon' if here else 'without it'}: one cannot go on with the state of the other's optimizer. "
        f"Nothing was changed. Resume with {same}, or start from the checkpoint's adapter instead of resuming."
    )
