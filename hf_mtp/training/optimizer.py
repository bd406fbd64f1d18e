"""Muon for the LoRA matrices, AdamW for the rest.

Muon works on matrices only and orthogonalizes their updates (Jordan et al., 2024,
kellerjordan.github.io/posts/muon). torch has it since 2.9.
"""

import torch
from torch import nn
from transformers import Trainer

from .config import MTPConfig


class MuonAdamW(torch.optim.Optimizer):
    """Combines Muon and AdamW in one optimizer.

    Args:
        model ([`torch.nn.Module`]): Muon trains its LoRA matrices A and B, AdamW its other trainable parameters.
        lr (`float`): AdamW's learning rate.
        muon_lr (`float`): Muon's learning rate. Muon's updates are scaled to the size of AdamW's.
        weight_decay (`float`): Weight decay of both.
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
        self.optimizers = [  # AdamW first: transformers logs the learning rate of the first group
            torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=True),
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        ]
        super().__init__([{"params": others}, {"params": matrices}], {"lr": lr})
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
        return {"parts": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["parts"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def uses_muon(trainer: Trainer) -> bool:
    """Whether the user chose no other optimizer, and matrices are not sharded."""
    args, default = trainer.args, MTPConfig.__dataclass_fields__["optim"].default
    has_other = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
    is_sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return args.muon and not has_other and args.optim == default and not is_sharded and hasattr(torch.optim, "Muon")


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
