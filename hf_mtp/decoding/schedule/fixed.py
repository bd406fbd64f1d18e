"""The fixed schedules: quadratic and linear decoding.

Shapes: B batch, K drafts.
"""

from ...layout.mask_plan import MaskPlan, whole_blocks
from ..drafters.acceptance import MaskAcceptance
from ..drafters.base import Drafts
from ..outcome import Outcome


class FixedSchedule:
    """Whole blocks of masks, and all drafts that they give.

    Args:
        k (`int`): Masks per block.
        linear (`bool`): Whether a block hangs on the last token of each row only.
    """

    def __init__(self, k: int, linear: bool):
        self.linear, self.mask_acceptance = linear, MaskAcceptance(k)

    def plan_masks(self, drafts: Drafts, k: int) -> MaskPlan:
        """The masks of the next pass.

        Args:
            drafts ([`Drafts`]): What the pass verifies.
            k (`int`): Masks per block at most; may be 0.
        """
        return whole_blocks(drafts.offered_B, drafts.count, k, self.linear)

    def choose(self, expected: list[list[list[float]]]) -> list[list[int]]:
        """How many drafts each drafter makes for each row: all of the first one's.

        Args:
            expected (`list`): For each drafter, what its `expect` gave.
        """
        first, *others = expected
        return [[len(row) for row in first], *([0] * len(first) for _ in others)]

    def fixed_drafts(self, k: int) -> int:
        """Drafts per row, used or not, of passes that all have the same shape."""
        return k

    def observe(self, outcome: Outcome) -> None:
        """Learns nothing."""
