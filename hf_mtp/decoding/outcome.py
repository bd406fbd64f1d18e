"""The result of one decoding pass, from which drafters, schedules and statistics learn.

Shapes: B batch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..layout.mask_plan import MaskPlan
from ..passes.decoding_pass import PassOutput
from .sequence import Sequence

MASK_DRAFTER = 0  # number of the drafter that drafts from masks: the first one in every list of drafters


class Origin(NamedTuple):
    """Where a draft comes from.

    Args:
        drafter (`int`): Number of the drafter that proposed it, such as [`MASK_DRAFTER`].
        place (`int`): How many tokens it is after the pending one, from 1.
    """

    drafter: int
    place: int


@dataclass(frozen=True)
class Verified:
    """The result of verification, per row.

    Args:
        tokens (`list[list[int]]`): New tokens.
        offered, accepted (`list[int]`): Number of drafts that were verified, and of those among the new tokens.
        pending_B (`torch.LongTensor` of shape `(B,)`): The last new token, which the model has not read.
        anchor_B (`torch.LongTensor` of shape `(B,)`): The column of the last token that the model has read: 0 for the
            token that was pending, i for the i-th draft. The masks on it make the next drafts.
        had_ended (`list[bool]`): Whether the row ended before the pass. Its new tokens, if any, are padding.
        columns (`list[list[int]]`, *optional*): For a tree of drafts, the columns of the accepted drafts, after the
            pending token's 0. In a chain they are consecutive.
    """

    tokens: list[list[int]]
    offered: list[int]
    accepted: list[int]
    pending_B: torch.LongTensor
    anchor_B: torch.LongTensor
    had_ended: list[bool]
    columns: list[list[int]] | None = None

    @property
    def new_tokens(self) -> list[int]:
        """Number of new tokens of each row."""
        return [len(tokens) for tokens in self.tokens]


@dataclass(frozen=True)
class Outcome:
    """A pass and its results.

    Args:
        sequences (`list[Sequence]`): The rows.
        columns (`int`): Columns of the pass, masks included. A prompt counts as one, since it must be read anyway.
        plan ([`MaskPlan`]): The masks that it computed.
        output ([`PassOutput`]): Its logits and hidden states.
        verified ([`Verified`]): The result of verification.
        origins (`list[list[Origin]]`): Where the drafts of each row came from.
    """

    sequences: list[Sequence]
    columns: int
    plan: MaskPlan
    output: PassOutput
    verified: Verified
    origins: list[list[Origin]]

    @property
    def next_masks(self) -> list[int]:
        """Number of masks on each row's last accepted token."""
        if not self.plan.masks:
            return [0] * len(self.sequences)
        return self.plan.drafts_BR.gather(1, self.verified.anchor_B[:, None])[:, 0].tolist()
