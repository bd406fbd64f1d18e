"""Drafts that are looked up, which takes no masks: what lookups of texts have in common.

Shapes: B batch, K drafts per row.
"""

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ..outcome import Outcome
from ..sequence import Sequence
from .base import NO_TOKEN, Drafts

MOST_DRAFTS = 16


@dataclass(frozen=True)
class Found:
    """What a lookup found.

    Args:
        tokens (`list[int]`): The continuation of a text.
        rates (`list[float]`): The probability that each is right if all before it are.
    """

    tokens: list[int]
    rates: list[float]


class LookupDrafter(ABC):
    """Looks up a continuation of each row, and compares it with the tokens that come, chosen or not."""

    def __init__(self):
        self._found: weakref.WeakKeyDictionary[Sequence, Found] = weakref.WeakKeyDictionary()

    @abstractmethod
    def look_up(self, sequence: Sequence, count: int) -> Found:
        """At most `count` tokens that may follow a row's text."""

    @abstractmethod
    def learn(self, sequence: Sequence, tokens: list[int]) -> None:
        """Learns from the new tokens of a row, which follow what was looked up last."""

    def observe(self, outcome: Outcome) -> None:
        """Learns from a pass."""
        for sequence, tokens in zip(outcome.sequences, outcome.verified.tokens, strict=True):
            self.learn(sequence, tokens)

    def expect(self, outcome: Outcome) -> list[list[float]]:
        """For each row, the probability that each possible draft is accepted if all before it are."""
        for sequence in outcome.sequences:
            wanted = min(MOST_DRAFTS, sequence.remaining_tokens - 1)
            is_of_use = wanted > 0 and not sequence.is_finished
            self._found[sequence] = self.look_up(sequence, wanted) if is_of_use else Found([], [])
        return [self._found[sequence].rates for sequence in outcome.sequences]

    def propose(self, outcome: Outcome, counts: list[int]) -> Drafts:
        """Makes `counts` drafts for each row of what was looked up."""
        longest, device = max(counts), outcome.verified.pending_B.device
        tokens, rates = [], []
        for sequence, count in zip(outcome.sequences, counts, strict=True):
            found, short = self._found[sequence], longest - count
            tokens.append([*found.tokens[:count], *[NO_TOKEN] * short])
            rates.append([*found.rates[:count], *[0.0] * short])
        return Drafts(torch.tensor(tokens, device=device), torch.tensor(rates, device=device))
