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
        self.checked: deque[tuple[float, float]] = deque(maxlen=64)
        self.masked: deque[tuple[float, float]] = deque(maxlen=64)

    def add(self, drafts: int, masks: int, seconds: float) -> None:
        """Counts in one pass."""
        if masks:
            self.masked.append((1 + drafts + masks, seconds))
        elif drafts:
            self.checked.append((1 + drafts, seconds))
        else:
            self.plain.append(seconds)

    @property
    def plain_seconds(self) -> float:
        """Of a plain pass, once there was one."""
        return statistics.median(self.plain)

    def seconds(self, columns: float, masks: bool) -> float:
        """Expected seconds of a pass over so many columns."""
        if passes := self.masked if masks else self.checked:
            return _on_line(passes, columns)
        base, slope = self.FIRST_GUESS
        return self.plain_seconds * (base + slope * columns)

    def slope(self) -> float:
        """Seconds that one column more costs a pass that verifies drafts; a trifle at least, for it is never free."""
        return max(self.seconds(9, masks=False) - self.seconds(8, masks=False), 0.01 * self.plain_seconds)


def _on_line(passes: deque[tuple[float, float]], columns: float) -> float:
    """Seconds for so many columns on the line that fits the passes best, without the slow exceptions."""
    middle = statistics.median(seconds for _, seconds in passes)
    usual = [(columns, seconds) for columns, seconds in passes if seconds < 2 * middle]
    xs, ys = zip(*usual, strict=True)
    slope = 0.0
    if len(set(xs)) > 1:
        slope = max(0.0, statistics.linear_regression(xs, ys).slope)
    return max(statistics.fmean(ys) + slope * (columns - statistics.fmean(xs)), 1e-9)
