"""Which drafts to take from a row's own text: those that bring more tokens than their columns cost time."""

from itertools import accumulate
from operator import mul

from .acceptance import Rates
from .costs import StepCosts
from .lookup import LONGEST_MATCH, Match


class LookupPolicy:
    """Learns how often lookups are right, which takes no forward pass, and takes them where they pay.

    Args:
        costs ([`StepCosts`]): What passes cost, as measured by others.
    """

    MOST_DRAFTS = 16
    MARGIN = 1.5  # by which the expected gain must exceed the cost where there would be a plain pass: both are rough

    def __init__(self, costs: StepCosts):
        self.costs, self.rates = costs, Rates(LONGEST_MATCH)  # by the number of tokens that agree

    def confidences(self, match: Match) -> list[float]:
        """The probability that each token of a match is accepted if all before it are."""
        return [self.rates.rate(match.length - 1 + place) for place in range(len(match.tokens))]

    def compare(self, found: list[Match], tokens: list[list[int]]) -> None:
        """Learns how often lookups are right, also from those that were not taken.

        Args:
            found (`list[Match]`): One per row.
            tokens (`list[list[int]]`): What followed in truth.
        """
        for match, truth in zip(found, tokens, strict=True):
            compared = list(zip(match.tokens, truth, strict=False))
            right = next((place for place, (guess, token) in enumerate(compared) if guess != token), len(compared))
            self.rates.count(len(compared), right, match.length - 1)

    def choose(self, found: list[Match], from_masks: list[float], pace: float) -> list[int]:
        """How many tokens of each row's match to take as its drafts, instead of those that masks would give.

        Args:
            found (`list[Match]`): One per row.
            from_masks (`list[float]`): Drafts that masks would bring each row, as far as they are accepted.
            pace (`float`): Tokens per second and row without masks.

        Returns:
            `list[int]`: 0 for rows that are better off without.
        """
        survival = [list(accumulate(self.confidences(match), mul)) for match in found]
        length, gain = self._length(survival, seconds_per_token=1 / (pace * len(found)))
        if any(from_masks):
            return [
                min(len(row), length) if sum(row[:length]) > instead else 0
                for row, instead in zip(survival, from_masks, strict=True)
            ]
        dearer = self.costs.seconds(1 + length, masks=False) - self.costs.plain_seconds
        return [min(len(row), length) if gain > self.MARGIN * dearer else 0 for row in survival]

    def _length(self, survival: list[list[float]], seconds_per_token: float) -> tuple[int, float]:
        """Drafts that are worth their columns, and the seconds that all rows save by them.

        Each further column costs all rows the same, so it must pay for all rows that have it together.
        """
        length, gained, column = 0, 0.0, self.costs.slope()
        while length < max(map(len, survival)):
            gain = sum(row[length] for row in survival if len(row) > length) * seconds_per_token
            if gain <= column:
                break
            length, gained = length + 1, gained + gain
        return length, gained
