"""Muon for the LoRA matrices, AdamW for the rest.

Muon takes matrices only and gives all directions of an update the same length (Jordan et al., 2024,
kellerjordan.github.io/posts/muon). torch has it since 2.9.
"""

import torch
from torch import nn

# Relative to AdamW's. Muon's updates are scaled to the size of AdamW's, so that they can be alike.
MUON_LEARNING_RATE = 1.0


class MuonAdamW(torch.optim.Optimizer):
    """Two optimizers that step as one.

    Args:
        model ([`torch.nn.Module`]): Its trainable parameters are optimized, LoRA's A and B by Muon, others by AdamW.
        lr (`float`): AdamW's learning rate; Muon's is [`MUON_LEARNING_RATE`] times as high.
        weight_decay (`float`): Of both.
        betas (`tuple[float, float]`), eps (`float`): AdamW's.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        is_matrix = [p.dim() == 2 and (".lora_A." in name or ".lora_B." in name) for name, p in trainable]
        matrices = [p for (_, p), matrix in zip(trainable, is_matrix, strict=True) if matrix]
        others = [p for (_, p), matrix in zip(trainable, is_matrix, strict=True) if not matrix]
        self.parts = [
            torch.optim.Muon(
                matrices, lr=MUON_LEARNING_RATE * lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=True),
        ]
        super().__init__([{"params": matrices}, {"params": others}], {"lr": lr})
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
        """
        Raises:
            ValueError: The state is another optimizer's.
        """
        if "parts" not in state_dict:
            raise ValueError(
                "The checkpoint's optimizer is not Muon with AdamW. Resume with the arguments it was trained with "
                "(`muon=False`?), or start from its adapter instead of resuming."
            )
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def make_muon_adamw():
    """What [`~transformers.Trainer`] takes as an optimizer that needs the whole model."""
    return MuonAdamW
