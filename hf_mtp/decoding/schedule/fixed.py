"""The fixed schedules: quadratic and linear decoding.

Shapes: B batch, K drafts.
"""

from ...layout.mask_plan import MaskPlan, whole_blocks
from ..drafters.acceptance import MaskAcceptance
from ..drafters.base import Drafts
from ..outcome import Outcome


class FixedSchedule:
    """Computes whole blocks of masks, and verifies all drafts from them.

    Args:
        k (`int`): Masks per block.
        linear (`bool`): Whether to hang a block on the last token of each row only.
    """

    def __init__(self, k: int, linear: bool):
        self.linear, self.mask_acceptance = linear, MaskAcceptance(k)

    def plan_masks(self, drafts: Drafts, k: int) -> MaskPlan:
        """The mask plan of the next pass.

        Args:
            drafts ([`Drafts`]): The drafts that the pass verifies.
            k (`int`): Most masks per block; may be 0.
        """
        return whole_blocks(drafts.offered_B, drafts.count, k, self.linear)

    def choose(self, expected: list[list[list[float]]]) -> list[list[int]]:
        """Numbers of drafts by drafter and row: all drafts of the first drafter.

        Args:
            expected (`list`): The result of `expect` of each drafter.
        """
        first, *others = expected
        return [[len(row) for row in first], *([0] * len(first) for _ in others)]

    def fixed_drafts(self, k: int) -> int:
        """Drafts per row, used or not, where all passes have the same shape."""
        return k

    def observe(self, outcome: Outcome) -> None:
        """Learns nothing."""
