"""The fixed schedules: quadratic and linear decoding.

Shapes: B batch, K drafts.
"""

import torch

from ...layout.mask_plan import MaskPlan, whole_blocks
from ..drafters.acceptance import MaskAcceptance
from ..drafters.base import Drafts, no_drafts
from ..outcome import MASK_DRAFTER, Origin, Outcome


class FixedSchedule:
    """Computes whole blocks of masks, and verifies all drafts from them.

    Args:
        k (`int`): Masks per block.
        linear (`bool`): Whether only the last token of each row has a block.
    """

    def __init__(self, k: int, linear: bool):
        self.linear, self.mask_acceptance = linear, MaskAcceptance(k)

    def plan_masks(self, drafts: Drafts, k: int) -> MaskPlan:
        """The mask plan of the next pass. Arguments as in [`~hf_mtp.decoding.schedule.base.Schedule.plan_masks`]."""
        return whole_blocks(drafts.offered_B, drafts.count, k, self.linear)

    def counts(self, expected: list[list[list[float]]]) -> list[list[int]]:
        """How many drafts each drafter proposes for each row: all that the masks allow, and none of other drafters."""
        first, *others = expected
        return [[len(row) for row in first], *([0] * len(first) for _ in others)]

    def choose(
        self, expected: list[list[list[float]]], proposals: list[Drafts | None], device: torch.device
    ) -> tuple[Drafts, list[list[Origin]]]:
        """The drafts that the next pass verifies, and where they come from: all drafts from masks."""
        rows, drafts = expected[MASK_DRAFTER], proposals[MASK_DRAFTER]
        drafts = no_drafts(len(rows), device) if drafts is None else drafts
        return drafts, [[Origin(MASK_DRAFTER, place + 1) for place in range(len(row))] for row in rows]

    def fixed_drafts(self, k: int) -> int:
        """Drafts per row, used or not, where all passes have the same shape."""
        return k

    def observe(self, outcome: Outcome) -> None:
        """Learns nothing."""
