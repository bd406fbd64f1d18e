"""The result of one decoding pass, from which drafters, schedules and statistics learn.

Shapes: B batch.
"""

from dataclasses import dataclass

import torch

from ..layout.mask_plan import MaskPlan
from ..passes.decoding_pass import PassOutput
from .sequence import Sequence


@dataclass(frozen=True)
class Verified:
    """The result of verification, per row.

    Args:
        tokens (`list[list[int]]`): New tokens.
        offered, accepted (`list[int]`): Number of drafts that were verified, and of those among the new tokens.
        pending_B (`torch.LongTensor` of shape `(B,)`): The last new token, which the model has not read.
        accepted_B (`torch.LongTensor` of shape `(B,)`): `accepted`, on the device.
        had_ended (`list[bool]`): Whether the row ended before the pass. Its new tokens, if any, are padding.
    """

    tokens: list[list[int]]
    offered: list[int]
    accepted: list[int]
    pending_B: torch.LongTensor
    accepted_B: torch.LongTensor
    had_ended: list[bool]

    @property
    def new_tokens(self) -> list[int]:
        """Number of new tokens of each row."""
        return [len(tokens) for tokens in self.tokens]


@dataclass(frozen=True)
class Outcome:
    """A pass and its results.

    Args:
        sequences (`list[Sequence]`): The rows.
        columns (`int`): Columns of the pass, masks included.
        plan ([`MaskPlan`]): The masks that it computed.
        output ([`PassOutput`]): Its logits and hidden states.
        verified ([`Verified`]): The result of verification.
        source_of_row (`list[int]`): Number of the drafter whose drafts each row verified, -1 for none.
    """

    sequences: list[Sequence]
    columns: int
    plan: MaskPlan
    output: PassOutput
    verified: Verified
    source_of_row: list[int]

    @property
    def next_masks(self) -> list[int]:
        """Number of masks on each row's last accepted token."""
        if not self.plan.masks:
            return [0] * len(self.sequences)
        return self.plan.drafts_BR.gather(1, self.verified.accepted_B[:, None])[:, 0].tolist()
