"""Drafts by prompt lookup: the tokens that followed the previous occurrence of a row's last n-gram.

This is prompt lookup decoding (Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding). The drafts need no model.
"""

import weakref
from dataclasses import dataclass

from ..sequence import Sequence
from .acceptance import Rates, count_matching
from .lookup import Found, LookupDrafter

LONGEST_INDEXED = 3  # tokens of the longest n-gram in the index
LONGEST_MATCH = 8  # tokens to compare at a place; a longer match tells nothing more


@dataclass(frozen=True)
class Match:
    """A place in a text whose preceding tokens equal the last tokens of the text.

    Args:
        length (`int`): Number of equal tokens, at most [`LONGEST_MATCH`]; 0 if there is no such place.
        tokens (`tuple[int, ...]`): The tokens that follow there.
    """

    length: int = 0
    tokens: tuple[int, ...] = ()


class NgramIndex:
    """The latest place of each n-gram in a growing text."""

    def __init__(self, tokens: list[int]):
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # the latest place that follows these tokens
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        """Appends tokens to the text."""
        for token in tokens:
            place = len(self.tokens)
            for length in range(1, min(LONGEST_INDEXED, place) + 1):
                self.after[tuple(self.tokens[place - length :])] = place
            self.tokens.append(token)

    def match(self, count: int) -> Match:
        """The latest place of the longest indexed n-gram at the end of the text, and `count` tokens that follow.

        Past the end of the text, the match continues with its own tokens, as in a loop.
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


class NgramDrafter(LookupDrafter):
    """Drafts the tokens that followed the same n-gram before.

    Args:
        rates ([`Rates`]): Acceptance rates by the length of the match, which the drafter updates. Matches that were
            not chosen count, too, since comparing them costs no pass.
    """

    def __init__(self, rates: Rates):
        super().__init__()
        self.rates = rates
        self._indexes: weakref.WeakKeyDictionary[Sequence, NgramIndex] = weakref.WeakKeyDictionary()
        self._matches: weakref.WeakKeyDictionary[Sequence, Match] = weakref.WeakKeyDictionary()

    def learn(self, sequence: Sequence, tokens: list[int]) -> None:
        """Compares the last match with the new tokens, and adds these to the index."""
        if sequence not in self._indexes:
            self._indexes[sequence] = NgramIndex(sequence.text)
            return
        match = self._matches.pop(sequence, Match())
        compared = min(len(match.tokens), len(tokens))
        self.rates.count(compared, count_matching(match.tokens, tokens), match.length - 1)
        self._indexes[sequence].extend(tokens)

    def look_up(self, sequence: Sequence, count: int) -> Found:
        """What followed the longest n-gram at the end of a row's text."""
        match = self._matches[sequence] = self._indexes[sequence].match(count)
        rates = [self.rates.rate(match.length - 1 + place) for place in range(len(match.tokens))]
        return Found(list(match.tokens), rates)
