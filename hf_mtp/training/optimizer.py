"""Muon for the LoRA matrices, AdamW for the rest.

Muon works on matrices only and orthogonalizes their updates (Jordan et al., 2024, kellerjordan.github.io/posts/muon).
An adapter has hundreds of small matrices of a few shapes. `torch.optim.Muon` updates them one by one, which leaves a
GPU idle. Here all matrices of one shape are updated together.

Shapes: N matrices, each of R rows and C columns.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable

import torch
from torch import nn
from transformers import Trainer

from .config import MTPConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum. Scales updates to the size of AdamW's, and computes as `torch.optim.Muon` does.

    Args:
        params (`Iterable[torch.nn.Parameter]`): Matrices.
        lr (`float`): Learning rate.
        weight_decay (`float`, *optional*, defaults to 0): Decoupled, as in AdamW.
        momentum (`float`, *optional*, defaults to 0.95): Decay of the moving average of gradients.
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
        size = 0.2 * max(matrices[0].shape) ** 0.5  # root mean square of AdamW's updates
        torch._foreach_add_(matrices, list(update_NRC.to(matrices[0].dtype).unbind()), alpha=-lr * size)

    def _average(self, matrix: nn.Parameter) -> torch.Tensor:
        """The moving average of a matrix's gradients."""
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]


def orthogonalized(matrix_NRC: torch.Tensor) -> torch.Tensor:
    """`(N, R, C)`, bfloat16: the matrices with all singular values moved near 1 by Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    is_tall = matrix_NRC.shape[1] > matrix_NRC.shape[2]
    x = (matrix_NRC.mT if is_tall else matrix_NRC).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # makes all singular values at most 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Combines Muon and AdamW in one optimizer.

    Args:
        model ([`torch.nn.Module`]): Muon trains its LoRA matrices A and B, AdamW its other trainable parameters.
        lr (`float`): AdamW's learning rate.
        muon_lr (`float`): Muon's learning rate. Muon's updates are scaled to the size of AdamW's.
        weight_decay (`float`): Weight decay of both.
        betas (`tuple[float, float]`), eps (`float`): AdamW's.
        undecayed (`Collection[str]`): Names of parameters that AdamW trains without weight decay: biases and gains.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        muon_lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        undecayed: Collection[str] = (),
    ):
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        is_matrix = [p.dim() == 2 and (".lora_A." in name or ".lora_B." in name) for name, p in trainable]
        matrices = [p for (_, p), matrix in zip(trainable, is_matrix, strict=True) if matrix]
        others = [named for named, matrix in zip(trainable, is_matrix, strict=True) if not matrix]
        # Groups may be empty: an adapter of noise tokens without a sampler head has nothing but matrices, and of an
        # adapter whose LoRA is frozen only the rest is trained.
        groups = [{"params": [p for name, p in others if name not in undecayed]}]
        if undecayed:
            groups.append({"params": [p for name, p in others if name in undecayed], "weight_decay": 0.0})
        self.optimizers = [  # AdamW first: transformers logs the learning rate of the first group
            torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=True),
            Muon([{"params": matrices}], lr=muon_lr, weight_decay=weight_decay),
        ]
        super().__init__([{"params": [p for _, p in others]}, {"params": matrices}], {"lr": lr})
        # The same group objects, so that a schedule that sets `lr` here also sets it there.
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"parts": [optimizer.state_dict() for optimizer in self.optimizers]}  # the key in saved checkpoints

    def load_state_dict(self, state_dict: dict) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["parts"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def uses_muon(trainer: Trainer) -> bool:
    """Whether the user chose no other optimizer, and matrices are not sharded."""
    args, default = trainer.args, MTPConfig.__dataclass_fields__["optim"].default
    has_other = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
    is_sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return args.muon and not has_other and args.optim == default and not is_sharded


def muon_adamw_settings(trainer: Trainer, model: nn.Module | None) -> dict:
    """Arguments of [`MuonAdamW`], after its model, from the arguments of a training.

    As with the optimizers of transformers, `weight_decay` does not apply to biases and to the gains of norms. Without
    weight decay, all parameters of AdamW are in one group.
    """
    args, undecayed = trainer.args, set()
    if args.weight_decay:
        model = trainer.model if model is None else model
        undecayed = {name for name, _ in model.named_parameters()} - {*trainer.get_decay_parameter_names(model)}
    settings = {"lr": args.learning_rate, "muon_lr": args.muon_learning_rate, "eps": args.adam_epsilon}
    settings |= {"betas": (args.adam_beta1, args.adam_beta2), "weight_decay": args.weight_decay}
    return {**settings, "undecayed": undecayed}


def make_muon_adamw():
    """The form in which [`~transformers.Trainer`] takes an optimizer that needs the whole model."""
    return MuonAdamW


def refuse_optimizer_change(checkpoint: str, there: bool | None, here: bool) -> None:
    """Raises a `ValueError` if only one of two trainings uses Muon, because their optimizer states do not match.

    Args:
        checkpoint (`str`): Name of the checkpoint.
        there (`bool`, *optional*): Whether Muon trained the checkpoint, if known.
        here (`bool`): Whether the resuming training uses Muon.
    """
    if there in (None, here):
        return
    same = "`muon=True`, with neither FSDP nor DeepSpeed" if there else "`muon=False`"
    raise ValueError(
        f"{checkpoint} was trained {'with' if there else 'without'} Muon, but this training runs "
        f"{'with' if here else 'without'} it, and cannot use the other optimizer's state. Nothing was changed. "
        f"Resume with {same}, or start a new training from the checkpoint's adapter."
    )
