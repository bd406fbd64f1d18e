"""The interface of a schedule: which masks a pass computes, and which drafts it verifies.

Shapes: B batch, K drafts.
"""

from typing import Protocol

import torch

from ...layout.mask_plan import MaskPlan
from ..drafters.acceptance import MaskAcceptance
from ..drafters.base import Drafts
from ..outcome import Origin, Outcome


class Schedule(Protocol):
    """Chooses the columns of passes. After each pass, the loop calls `observe`, `counts` and `choose`.

    Attributes:
        mask_acceptance ([`MaskAcceptance`]): Acceptance rates of drafts from masks, which the drafter updates.
    """

    mask_acceptance: MaskAcceptance

    def plan_masks(self, drafts: Drafts, k: int) -> MaskPlan:
        """The mask plan of the next pass.

        Args:
            drafts ([`Drafts`]): The drafts that the pass verifies.
            k (`int`): Most masks per block; may be 0.
        """

    def counts(self, expected: list[list[list[float]]]) -> list[list[int]]:
        """How many drafts each drafter proposes for each row.

        Args:
            expected (`list[list[list[float]]]`): By drafter and row, the probability that each possible draft is
                accepted if all before it are: the results of `expect`.
        """

    def choose(
        self, expected: list[list[list[float]]], proposals: list[Drafts | None], device: torch.device
    ) -> tuple[Drafts, list[list[Origin]]]:
        """The drafts that the next pass verifies, and where those of each row come from.

        Args:
            expected (`list[list[list[float]]]`): As in [`Schedule.counts`].
            proposals (`list[Drafts | None]`): The drafts of each drafter.
            device (`torch.device`): Device of the drafts.
        """

    def fixed_drafts(self, k: int) -> int:
        """Drafts per row, used or not, if passes may have a few fixed shapes only."""

    def observe(self, outcome: Outcome) -> None:
        """Learns from a pass."""
