"""Acceptance rates of drafts, as running averages that slowly forget old drafts."""

from bisect import bisect
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import mul


class Rates:
    """Acceptance rates of drafts by class.

    Args:
        priors (`Sequence[float]`): The rate of each class until drafts are counted. The drafts of a run belong to
            consecutive classes, and then to the last.
    """

    MEMORY = 0.99
    PRIOR_COUNT = 2.0  # verified drafts

    def __init__(self, priors: Sequence[float]):
        self.offered = [self.PRIOR_COUNT] * len(priors)
        self.accepted = [prior * self.PRIOR_COUNT for prior in priors]

    def count(self, offered: int, accepted: int, first: int = 0) -> None:
        """Counts a run of `offered` drafts, of which the first `accepted` were right and the next, if any, wrong.

        The first draft belongs to class `first`.
        """
        for place in range(min(offered, accepted + 1)):
            self.count_one(first + place, place < accepted)

    def count_one(self, index: int, accepted: bool) -> None:
        """Counts one draft of a class."""
        index = min(index, len(self.offered) - 1)
        self.offered[index] = self.offered[index] * self.MEMORY + 1
        self.accepted[index] = self.accepted[index] * self.MEMORY + accepted

    def forget(self, most: float) -> None:
        """Lets what was counted so far weigh as much as `most` drafts of each class."""
        for index, offered in enumerate(self.offered):
            share = min(1.0, most / offered)
            self.offered[index] *= share
            self.accepted[index] *= share

    def rate(self, index: int) -> float:
        """The acceptance rate of a class."""
        index = min(index, len(self.offered) - 1)
        return self.accepted[index] / self.offered[index]


def count_matching(drafts: Iterable[int], tokens: Iterable[int]) -> int:
    """Number of drafts before the first that differs from its token."""
    pairs = list(zip(drafts, tokens, strict=False))
    return next((place for place, (draft, token) in enumerate(pairs) if draft != token), len(pairs))


class Calibration:
    """How often drafts are right, by the confidence that the adapter has in them.

    A confidence is corrected by the share of right drafts among those of similar confidence. Until drafts are counted,
    it is taken as it is.
    """

    EDGES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # between classes
    PRIOR_COUNT = 4.0  # right drafts

    def __init__(self):
        self.expected = [self.PRIOR_COUNT] * (len(self.EDGES) + 1)
        self.accepted = [self.PRIOR_COUNT] * (len(self.EDGES) + 1)

    def count(self, confidence: float, accepted: bool) -> None:
        """Counts one draft."""
        index = bisect(self.EDGES, confidence)
        self.expected[index] = self.expected[index] * Rates.MEMORY + confidence
        self.accepted[index] = self.accepted[index] * Rates.MEMORY + accepted

    def rate(self, confidence: float) -> float:
        """The probability that a draft of this confidence is right."""
        index = bisect(self.EDGES, confidence)
        return min(1.0, confidence * self.accepted[index] / self.expected[index])


MASK_PRIOR = 0.6  # high enough that late masks of a block get a trial
# The probability of the second and third candidate where the first is wrong.
SIBLING_PRIORS = (0.3, 0.12)
SIBLINGS = len(SIBLING_PRIORS)  # that the adaptive schedule may choose


class MaskAcceptance:
    """Acceptance of drafts from masks and of their siblings.

    Before drafts are made, only their place in the block tells how likely they are right. Afterwards, their confidence
    does.

    Args:
        k (`int`): Most masks per block.

    Attributes:
        rates (`list[float]`): Probability that the draft in each place is accepted if those before it are.
        survival (`list[float]`): Probability that the first 1, 2 ... k drafts are all accepted.
    """

    def __init__(self, k: int):
        self.k, self.counts, self.calibration = k, Rates([MASK_PRIOR] * k), Calibration()
        self.sibling_counts = [Rates([prior]) for prior in SIBLING_PRIORS]
        self._update()

    def count(self, rows: list[tuple[int, int]]) -> None:
        """Counts the numbers of offered and of accepted drafts of each row."""
        for offered, accepted in rows:
            self.counts.count(offered, accepted)
        self._update()

    def forget(self, most: float) -> None:
        """Lets what was counted by place so far weigh as much as `most` drafts in each place."""
        self.counts.forget(most)

    def compare(
        self, drafts: list[int], confidences: list[float], siblings: list[list[int]], tokens: list[int]
    ) -> None:
        """Counts a row's chain of drafts, and their siblings, as far as the new tokens tell whether they are right.

        Args:
            drafts (`list[int]`), confidences (`list[float]`), siblings (`list[list[int]]`): The chain, the adapter's
                confidence in each draft, and the next likeliest tokens in each place.
            tokens (`list[int]`): The tokens that came.
        """
        right = count_matching(drafts, tokens)
        offered = min(len(drafts), len(tokens))
        for place in range(min(offered, right + 1)):
            self.calibration.count(confidences[place], place < right)
        if right < offered:
            for counts, sibling in zip(self.sibling_counts, siblings[right], strict=False):
                counts.count_one(0, sibling == tokens[right])
        self.count([(offered, right)])

    def rates_of(self, confidences: list[float]) -> list[float]:
        """The probability that each draft of a chain is accepted if those before it are, by their confidences."""
        return [self.calibration.rate(confidence) for confidence in confidences]

    def sibling_rates_of(self, rates: list[float]) -> list[list[float]]:
        """For each draft of these rates, the probability that its second, third ... candidate is right instead."""
        return [[(1 - rate) * counts.rate(0) for counts in self.sibling_counts] for rate in rates]

    def _update(self) -> None:
        self.rates = [self.counts.rate(place) for place in range(self.k)]
        self.survival = list(accumulate(self.rates, mul))
