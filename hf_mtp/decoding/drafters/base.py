"""Drafts, and the interface of the drafters that make them.

Shapes: B batch, K drafts per row.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F

from ..outcome import Outcome

NO_TOKEN = -1


@dataclass(frozen=True)
class Drafts:
    """Draft tokens of each row: a chain, or a tree of alternatives.

    Args:
        token_BK (`torch.LongTensor` of shape `(B, K)`): The drafts, -1 where a row has no more.
        confidence_BK (`torch.Tensor` of shape `(B, K)`): Probability that each is accepted if its parent is, as far as
            its drafter knows.
        parent_BK (`torch.LongTensor` of shape `(B, K)`, *optional*): The column of the token that each follows: 0 is
            the pending token, i the i-th draft. Parents come first, and drafts with one parent differ. If `None`, each
            draft follows the one before it.
        sibling_BKC (`torch.LongTensor` of shape `(B, K, C)`, *optional*): For a chain that a drafter proposes, the
            next likeliest tokens in the place of each draft.
    """

    token_BK: torch.LongTensor
    confidence_BK: torch.Tensor
    parent_BK: torch.LongTensor | None = None
    sibling_BKC: torch.LongTensor | None = None

    @property
    def count(self) -> int:
        """K."""
        return self.token_BK.shape[1]

    @cached_property
    def tokens(self) -> list[list[int]]:
        """`token_BK` on the host. The first use waits for the device."""
        return self.token_BK.tolist()

    @cached_property
    def confidences(self) -> list[list[float]]:
        """`confidence_BK` on the host."""
        return self.confidence_BK.tolist()

    @cached_property
    def parents(self) -> list[list[int]]:
        """`parents_BK` on the host."""
        return self.parents_BK.tolist()

    @cached_property
    def siblings(self) -> list[list[list[int]]]:
        """`sibling_BKC` on the host."""
        if self.sibling_BKC is None:
            return [[[] for _ in row] for row in self.tokens]
        return self.sibling_BKC.tolist()

    @property
    def offered_B(self) -> torch.LongTensor:
        """`(B,)`: how many drafts each row has."""
        return (self.token_BK != NO_TOKEN).sum(dim=1)

    @property
    def parents_BK(self) -> torch.LongTensor:
        """`(B, K)`: the parents, also of a chain."""
        if self.parent_BK is not None:
            return self.parent_BK
        return torch.arange(self.count, device=self.token_BK.device).expand_as(self.token_BK)

    def select_rows(self, index: list[int]) -> "Drafts":
        """The drafts of these rows."""
        parent_BK = None if self.parent_BK is None else self.parent_BK[index]
        return Drafts(self.token_BK[index], self.confidence_BK[index], parent_BK)

    def where(self, wanted_BK: torch.BoolTensor) -> "Drafts":
        """Drops all other drafts."""
        return replace(self, token_BK=self.token_BK.where(wanted_BK, NO_TOKEN))

    def padded(self, count: int) -> "Drafts":
        """Pads to K = `count` places, without drafts in the new ones."""
        short = (0, count - self.count)
        parent_BK = None if self.parent_BK is None else F.pad(self.parent_BK, short)
        return Drafts(F.pad(self.token_BK, short, value=NO_TOKEN), F.pad(self.confidence_BK, short), parent_BK)

    def with_rows(self, other: "Drafts") -> "Drafts":
        """Appends the rows of `other`."""
        count = max(self.count, other.count)
        one, two = self.padded(count), other.padded(count)
        is_chain = self.parent_BK is None and other.parent_BK is None
        return Drafts(
            torch.cat([one.token_BK, two.token_BK]),
            torch.cat([one.confidence_BK, two.confidence_BK]),
            None if is_chain else torch.cat([one.parents_BK, two.parents_BK]),
        )


def no_drafts(batch: int, device: torch.device) -> Drafts:
    """No draft for any of `batch` rows."""
    none = torch.empty(batch, 0, device=device)
    return Drafts(none.long(), none)


class Drafter(Protocol):
    """A source of drafts. After each pass, the loop calls `observe`, `expect` and, if wanted, `propose`."""

    def observe(self, outcome: Outcome) -> None:
        """Learns from a pass how often its proposals are right, whether or not these were verified.

        Args:
            outcome ([`Outcome`]): The pass and what was verified in it.
        """

    def expect(self, outcome: Outcome) -> list[list[float]]:
        """For each row, the probability that each possible draft is accepted if all before it are.

        Args:
            outcome ([`Outcome`]): The latest pass, whose last tokens the drafts will follow.
        """

    def propose(self, outcome: Outcome, counts: list[int]) -> Drafts:
        """Makes a chain of drafts for each row.

        Args:
            outcome ([`Outcome`]): The pass that `expect` got.
            counts (`list[int]`): Drafts of each row, at most as many as `expect` returned probabilities.
        """
