"""What one pass of decoding gave, for those who learn from it.

Shapes: B batch.
"""

from dataclasses import dataclass

import torch

from ..layout.mask_plan import MaskPlan
from ..passes.decoding_pass import PassOutput
from .sequence import Sequence


@dataclass(frozen=True)
class Verified:
    """What verification decided, per row.

    Args:
        tokens (`list[list[int]]`): New tokens.
        offered, accepted (`list[int]`): Drafts that were verified, and how many of these are among the new tokens.
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
        """How many tokens each row got."""
        return [len(tokens) for tokens in self.tokens]


@dataclass(frozen=True)
class Outcome:
    """A pass, and what came of it.

    Args:
        sequences (`list[Sequence]`): The rows.
        columns (`int`): Columns of the pass, masks included.
        plan ([`MaskPlan`]): Its masks.
        output ([`PassOutput`]): Logits and hidden states.
        verified ([`Verified`]): What verification decided.
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
        """How many masks hang on the token where each row ended."""
        if not self.plan.masks:
            return [0] * len(self.sequences)
        return self.plan.drafts_BR.gather(1, self.verified.accepted_B[:, None])[:, 0].tolist()
