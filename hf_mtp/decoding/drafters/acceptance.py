"""Acceptance rates of drafts, as running averages that slowly forget old drafts."""

from itertools import accumulate
from operator import mul


class Rates:
    """Acceptance rates of drafts by class.

    Args:
        classes (`int`): Number of classes. The drafts of a run belong to consecutive classes, and then to the last.
    """

    MEMORY = 0.99
    # The prior counts as verified drafts. Its rate is high enough that late masks of a block get a trial.
    PRIOR_RATE, PRIOR_COUNT = 0.6, 2.0

    def __init__(self, classes: int):
        self.offered = [self.PRIOR_COUNT] * classes
        self.accepted = [self.PRIOR_RATE * self.PRIOR_COUNT] * classes

    def count(self, offered: int, accepted: int, first: int = 0) -> None:
        """Counts a run of `offered` drafts, of which the first `accepted` were right and the next, if any, wrong.

        The first draft belongs to class `first`.
        """
        for place in range(min(offered, accepted + 1)):
            index = min(first + place, len(self.offered) - 1)
            self.offered[index] = self.offered[index] * self.MEMORY + 1
            self.accepted[index] = self.accepted[index] * self.MEMORY + (place < accepted)

    def rate(self, index: int) -> float:
        """The acceptance rate of a class."""
        index = min(index, len(self.offered) - 1)
        return self.accepted[index] / self.offered[index]


class MaskAcceptance:
    """Acceptance of drafts from masks, by place in the block.

    Args:
        k (`int`): Most masks per block.

    Attributes:
        rates (`list[float]`): Probability that each draft is accepted if those before it are.
        survival (`list[float]`): Probability that the first 1, 2 ... k drafts are all accepted.
    """

    def __init__(self, k: int):
        self.k, self.counts = k, Rates(k)
        self._update()

    def count(self, rows: list[tuple[int, int]]) -> None:
        """Counts the numbers of offered and of accepted drafts of each row."""
        for offered, accepted in rows:
            self.counts.count(offered, accepted)
        if rows:
            self._update()

    def expected_drafts(self, masks: int) -> float:
        """Expected number of accepted drafts in the pass that follows one with so many masks."""
        return sum(value for value, _ in self.best_values[:masks])

    def expected_columns(self, masks: int) -> float:
        """Expected number of drafts that this pass verifies."""
        return sum(landing for _, landing in self.best_values[:masks])

    def _update(self) -> None:
        self.rates = [self.counts.rate(place) for place in range(self.k)]
        self.survival = list(accumulate(self.rates, mul))
        landings = [
            reached * (1 - rate) for reached, rate in zip([1.0, *self.survival[:-1]], self.rates, strict=True)
        ] + [self.survival[-1]]
        # Value and landing probability of each mask of each block, best first.
        self.best_values = sorted(
            ((landing * survival, landing) for landing in landings for survival in self.survival), reverse=True
        )
