"""Drafts from a row's own text: what followed the last time that its latest tokens occurred.

This is prompt lookup decoding (Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding). Where a text repeats its
prompt or itself, such drafts cost nothing.
"""

import weakref
from dataclasses import dataclass

import torch

from ..outcome import Outcome
from ..sequence import Sequence
from .acceptance import Rates
from .base import NO_TOKEN, Drafts

LONGEST_INDEXED = 3  # tokens by which places are found
LONGEST_MATCH = 8  # tokens that are compared there; a longer match tells nothing more
MOST_DRAFTS = 16


@dataclass(frozen=True)
class Match:
    """A place in a text that reads like its end.

    Args:
        length (`int`): Tokens before the place that agree with the last ones, at most [`LONGEST_MATCH`]; 0 if there is
            no such place.
        tokens (`list[int]`): What followed there.
    """

    length: int = 0
    tokens: tuple[int, ...] = ()


class NgramIndex:
    """The places of all n-grams of a text that grows.

    Args:
        tokens (`list[int]`): The text so far.
    """

    def __init__(self, tokens: list[int]):
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # the latest place that follows these tokens
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        """Adds the next tokens."""
        for token in tokens:
            place = len(self.tokens)
            for length in range(1, min(LONGEST_INDEXED, place) + 1):
                self.after[tuple(self.tokens[place - length :])] = place
            self.tokens.append(token)

    def match(self, count: int) -> Match:
        """The latest place that reads most like the end of the text, and up to `count` tokens of what followed.

        Where the text ends, the match goes on with its own tokens, around a loop.
        """
        end = len(self.tokens)
        for length in range(min(LONGEST_INDEXED, end), 0, -1):
            place = self.after.get(tuple(self.tokens[end - length :]))
            if place is not None:
                break
        else:
            return Match()
        while length < min(LONGEST_MATCH, place) and self.tokens[place - length - 1] == self.tokens[end - length - 1]:
            length += 1
        found: list[int] = []
        for source in range(place, place + count):
            found.append(self.tokens[source] if source < end else found[source - end])
        return Match(length, tuple(found))


class NgramDrafter:
    """Drafts what followed the same n-gram before.

    Args:
        rates ([`Rates`]): Learns how often such drafts are accepted, by the number of tokens that agree. Drafts that
            were found but not taken count, too: comparing them costs no pass.
    """

    def __init__(self, rates: Rates):
        self.rates = rates
        self._indexes: weakref.WeakKeyDictionary[Sequence, NgramIndex] = weakref.WeakKeyDictionary()
        self._matches: weakref.WeakKeyDictionary[Sequence, Match] = weakref.WeakKeyDictionary()

    def observe(self, outcome: Outcome, is_own: list[bool]) -> None:
        """Compares what it found with what came, and reads on."""
        for sequence, tokens in zip(outcome.sequences, outcome.verified.tokens, strict=True):
            if sequence not in self._indexes:
                self._indexes[sequence] = NgramIndex(sequence.text)
                continue
            match = self._matches.get(sequence, Match())
            compared = list(zip(match.tokens, tokens, strict=False))
            right = next((place for place, (guess, token) in enumerate(compared) if guess != token), len(compared))
            self.rates.count(len(compared), right, match.length - 1)
            self._indexes[sequence].extend(tokens)

    def expect(self, outcome: Outcome) -> list[list[float]]:
        """For each row, how likely each draft that it could make is to be accepted if all before it are."""
        for sequence in outcome.sequences:
            wanted = min(MOST_DRAFTS, sequence.remaining_tokens - 1)
            is_of_use = wanted > 0 and not sequence.is_finished
            self._matches[sequence] = self._indexes[sequence].match(wanted) if is_of_use else Match()
        return [self._confidences(self._matches[sequence]) for sequence in outcome.sequences]

    def propose(self, outcome: Outcome, counts: list[int]) -> Drafts:
        """Makes drafts. Arguments as in [`MaskDrafter.propose`]."""
        longest, device = max(counts), outcome.verified.pending_B.device
        tokens, confidences = [], []
        for sequence, count in zip(outcome.sequences, counts, strict=True):
            match, short = self._matches[sequence], longest - count
            tokens.append([*match.tokens[:count], *[NO_TOKEN] * short])
            confidences.append([*self._confidences(match)[:count], *[0.0] * short])
        return Drafts(torch.tensor(tokens, device=device), torch.tensor(confidences, device=device))

    def _confidences(self, match: Match) -> list[float]:
        return [self.rates.rate(match.length - 1 + place) for place in range(len(match.tokens))]
