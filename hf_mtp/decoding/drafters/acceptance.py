"""Acceptance rates of drafts, as running averages that slowly forget old drafts."""

from collections.abc import Iterable
from itertools import accumulate
from operator import mul


class Rates:
    """Acceptance rates of drafts by class.

    Args:
        classes (`int`): Number of classes. The drafts of a run belong to consecutive classes, and then to the last.
        prior_rate (`float`, *optional*): The rate of all classes until drafts are counted.
    """

    MEMORY = 0.99
    # The prior counts as verified drafts. Its rate is high enough that late masks of a block get a trial.
    PRIOR_RATE, PRIOR_COUNT = 0.6, 2.0

    def __init__(self, classes: int, prior_rate: float = PRIOR_RATE):
        self.offered = [self.PRIOR_COUNT] * classes
        self.accepted = [prior_rate * self.PRIOR_COUNT] * classes

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


# Of the second and third candidate, where the first is right in half of the places.
SIBLING_PRIORS = (0.12, 0.06)
SIBLINGS = len(SIBLING_PRIORS)  # that the adaptive schedule may choose


class MaskAcceptance:
    """Acceptance of drafts from masks and of their siblings, by place in the block.

    Args:
        k (`int`): Most masks per block.

    Attributes:
        rates (`list[float]`): Probability that each draft is accepted if those before it are.
        sibling_rates (`list[list[float]]`): For each draft, the probability that its second, third ... candidate is
            right instead.
        survival (`list[float]`): Probability that the first 1, 2 ... k drafts are all accepted.
    """

    def __init__(self, k: int):
        self.k, self.counts = k, Rates(k)
        self.sibling_counts = [Rates(k, prior) for prior in SIBLING_PRIORS]
        self._update()

    def count(self, rows: list[tuple[int, int]]) -> None:
        """Counts the numbers of offered and of accepted drafts of each row."""
        for offered, accepted in rows:
            self.counts.count(offered, accepted)
        self._update()

    def forget(self, most: float) -> None:
        """Lets what was counted so far weigh as much as `most` drafts in each place."""
        for counts in (self.counts, *self.sibling_counts):
            counts.forget(most)

    def compare(self, drafts: list[int], siblings: list[list[int]], tokens: list[int]) -> None:
        """Counts a row's chain of drafts, and their siblings, as far as the new tokens tell whether they are right.

        Args:
            drafts (`list[int]`), siblings (`list[list[int]]`): The chain, and the next likeliest tokens in each place.
            tokens (`list[int]`): The tokens that came.
        """
        right = count_matching(drafts, tokens)
        offered = min(len(drafts), len(tokens))
        for place in range(min(offered, right + 1)):
            for counts, sibling in zip(self.sibling_counts, siblings[place], strict=False):
                counts.count_one(place, sibling == tokens[place])
        self.count([(offered, right)])

    def _update(self) -> None:
        self.rates = [self.counts.rate(place) for place in range(self.k)]
        self.sibling_rates = [[counts.rate(place) for counts in self.sibling_counts] for place in range(self.k)]
        self.survival = list(accumulate(self.rates, mul))
