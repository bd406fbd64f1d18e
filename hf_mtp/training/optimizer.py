"""Muon for the LoRA matrices, AdamW for the rest.

Muon takes matrices only and gives all directions of an update the same length (Jordan et al., 2024,
kellerjordan.github.io/posts/muon). torch has it since 2.9.
"""

import torch
from torch import nn
from transformers import Trainer

from .config import MTPConfig


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
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
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
