"""Drafts, and the interface of the drafters that make them.

Shapes: B batch, K drafts per row.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F

from ..outcome import Outcome

NO_TOKEN = -1


@dataclass(frozen=True)
class Drafts:
    """Guesses at each row's next tokens.

    Args:
        token_BK (`torch.LongTensor` of shape `(B, K)`): The drafts, -1 where a row has no more.
        confidence_BK (`torch.Tensor` of shape `(B, K)`): Probability that each is accepted if all before it are.
    """

    token_BK: torch.LongTensor
    confidence_BK: torch.Tensor

    @property
    def count(self) -> int:
        """K."""
        return self.token_BK.shape[1]

    @property
    def offered_B(self) -> torch.LongTensor:
        """`(B,)`: how many drafts each row has."""
        return (self.token_BK != NO_TOKEN).sum(dim=1)

    def select_rows(self, index: list[int]) -> "Drafts":
        """The drafts of these rows."""
        return Drafts(self.token_BK[index], self.confidence_BK[index])

    def where(self, wanted_BK: torch.BoolTensor) -> "Drafts":
        """Drops all other drafts."""
        return replace(self, token_BK=self.token_BK.where(wanted_BK, NO_TOKEN))

    def padded(self, count: int) -> "Drafts":
        """Pads to K = `count` places, without drafts in the new ones."""
        short = (0, count - self.count)
        return Drafts(F.pad(self.token_BK, short, value=NO_TOKEN), F.pad(self.confidence_BK, short))

    def with_rows(self, other: "Drafts") -> "Drafts":
        """Appends the rows of `other`."""
        count = max(self.count, other.count)
        one, two = self.padded(count), other.padded(count)
        return Drafts(torch.cat([one.token_BK, two.token_BK]), torch.cat([one.confidence_BK, two.confidence_BK]))

    def overridden_by(self, other: "Drafts") -> "Drafts":
        """Takes the rows of `other` where it has drafts, and keeps the other rows."""
        count = max(self.count, other.count)
        mine, theirs = self.padded(count), other.padded(count)
        chosen_B1 = theirs.offered_B[:, None] > 0
        return Drafts(
            theirs.token_BK.where(chosen_B1, mine.token_BK), theirs.confidence_BK.where(chosen_B1, mine.confidence_BK)
        )


def no_drafts(batch: int, device: torch.device) -> Drafts:
    """No draft for any of `batch` rows."""
    none = torch.empty(batch, 0, device=device)
    return Drafts(none.long(), none)


class Drafter(Protocol):
    """A source of drafts. After each pass, the loop calls `observe`, `expect` and, if chosen, `propose`."""

    def observe(self, outcome: Outcome, is_own: list[bool]) -> None:
        """Learns from a pass. `is_own` tells which rows verified drafts of this drafter."""

    def expect(self, outcome: Outcome) -> list[list[float]]:
        """For each row, the probability that each possible draft is accepted if all before it are."""

    def propose(self, outcome: Outcome, counts: list[int]) -> Drafts:
        """Makes `counts` drafts for each row, at most as many as `expect` returned probabilities."""


def count_matching(drafts: Iterable[int], tokens: Iterable[int]) -> int:
    """Number of drafts before the first that differs from its token."""
    pairs = list(zip(drafts, tokens, strict=False))
    return next((place for place, (draft, token) in enumerate(pairs) if draft != token), len(pairs))
