"""What forward passes cost on this machine, as measured while decoding."""

import statistics
from collections import deque


class StepCosts:
    """Seconds of a pass, drafting included.

    Three kinds: plain ones, over one token per row; those that verify drafts; and those that compute masks too. Of the
    last two, a straight line in the number of columns.
    """

    # While nothing else is known: a pass over n columns costs as many plain ones.
    FIRST_GUESS = (1.2, 0.03)

    def __init__(self):
        self.plain: deque[float] = deque(maxlen=15)
        self.checked, self.masked = Line(), Line()
        self.plain_seconds = 0.0  # the median; 0 before there was one

    def add(self, drafts: int, masks: int, seconds: float) -> None:
        """Counts in one pass."""
        if masks:
            self.masked.add(1 + drafts + masks, seconds)
        elif drafts:
            self.checked.add(1 + drafts, seconds)
        else:
            self.plain.append(seconds)
            self.plain_seconds = statistics.median(self.plain)

    def seconds(self, columns: float, masks: bool) -> float:
        """Expected seconds of a pass over so many columns."""
        line = self.masked if masks else self.checked
        if line.points:
            return line.at(columns)
        base, slope = self.FIRST_GUESS
        return self.plain_seconds * (base + slope * columns)

    def slope(self) -> float:
        """Seconds that one column more costs a pass that verifies drafts; a trifle at least, for it is never free."""
        return max(self.seconds(9, masks=False) - self.seconds(8, masks=False), 0.01 * self.plain_seconds)


class Line:
    """The straight line through the latest points, without those that are far too high; fitted now and then."""

    REFIT_EVERY = 8  # points

    def __init__(self):
        self.points: deque[tuple[float, float]] = deque(maxlen=64)
        self.unseen = 0

    def add(self, x: float, y: float) -> None:
        self.points.append((x, y))
        self.unseen += 1
        if self.unseen >= self.REFIT_EVERY or len(self.points) < self.REFIT_EVERY:
            self._fit()

    def at(self, x: float) -> float:
        return max(self.middle_y + self.slope * (x - self.middle_x), 1e-9)

    def _fit(self) -> None:
        self.unseen = 0
        limit = 2 * statistics.median(y for _, y in self.points)
        xs, ys = zip(*((x, y) for x, y in self.points if y < limit), strict=True)
        self.middle_x, self.middle_y, self.slope = statistics.fmean(xs), statistics.fmean(ys), 0.0
        if len(set(xs)) > 1:
            self.slope = max(0.0, statistics.linear_regression(xs, ys).slope)
