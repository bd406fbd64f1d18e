"""How often drafts are accepted, by what is known of them beforehand. Old drafts count less and less."""

from itertools import accumulate
from operator import mul


class Rates:
    """Acceptance rates of drafts in a few classes.

    Args:
        classes (`int`): How many. A run of drafts goes through them one by one and stays in the last.
    """

    MEMORY = 0.99
    # At first, as if so many drafts had been verified: enough of them right that deep masks get a trial.
    PRIOR_RATE, PRIOR_COUNT = 0.6, 2.0

    def __init__(self, classes: int):
        self.offered = [self.PRIOR_COUNT] * classes
        self.accepted = [self.PRIOR_RATE * self.PRIOR_COUNT] * classes

    def count(self, offered: int, accepted: int, first: int = 0) -> None:
        """Counts a run of drafts, of which the first `accepted` were right; the next, if offered, was wrong.

        Args:
            offered (`int`), accepted (`int`): Drafts of the run.
            first (`int`): The class of the first one.
        """
        for place in range(min(offered, accepted + 1)):
            index = min(first + place, len(self.offered) - 1)
            self.offered[index] = self.offered[index] * self.MEMORY + 1
            self.accepted[index] = self.accepted[index] * self.MEMORY + (place < accepted)

    def rate(self, index: int) -> float:
        """The rate of a class."""
        index = min(index, len(self.offered) - 1)
        return self.accepted[index] / self.offered[index]


class MaskAcceptance:
    """Acceptance of drafts from masks: the first, second ... of a block.

    Args:
        k (`int`): Drafts at most.

    Attributes:
        rates (`list[float]`): Of each draft, if those before it were accepted.
        survival (`list[float]`): Of the first 1, 2 ... k drafts together.
    """

    def __init__(self, k: int):
        self.k, self.counts = k, Rates(k)
        self._update()

    def count(self, rows: list[tuple[int, int]]) -> None:
        """Counts, for each row, drafts offered and drafts accepted."""
        for offered, accepted in rows:
            self.counts.count(offered, accepted)
        if rows:
            self._update()

    def expected_drafts(self, masks: int) -> float:
        """Accepted drafts of a pass that follows one with so many masks, by averages alone."""
        return sum(value for value, _ in self.best_values[:masks])

    def expected_columns(self, masks: int) -> float:
        """Drafts that such a pass verifies."""
        return sum(landing for _, landing in self.best_values[:masks])

    def _update(self) -> None:
        self.rates = [self.counts.rate(place) for place in range(self.k)]
        self.survival = list(accumulate(self.rates, mul))
        landings = [
            reached * (1 - rate) for reached, rate in zip([1.0, *self.survival[:-1]], self.rates, strict=True)
        ] + [self.survival[-1]]
        # Of each mask of each block, best first: value, landing.
        self.best_values = sorted(
            ((landing * survival, landing) for landing in landings for survival in self.survival), reverse=True
        )
