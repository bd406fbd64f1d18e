"""The cost of forward passes on this machine, by their number of columns. It is measured once per model."""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

PLAIN_COLUMNS = (5, 9, 13, 17)
MASKED_COLUMNS = (3, 9, 13, 17, 41)
LEAST_SLOPE = 0.002  # a column that brings less than one token in 500 passes is not worth having
SLOW_SECONDS = 0.05  # if a plain pass takes longer, each size is timed only once
DIP = 0.9  # a larger pass that costs less than this share is faster; costs nearer than that differ by noise


@dataclass(frozen=True)
class PassCosts:
    """The cost of passes, in units of a plain pass over one token.

    More columns may cost less if matrix products use a slow kernel for few rows, as in float32 on some CPUs. There is
    a *gap* between two numbers of columns if passes of sizes between them are slower than the larger one. They are
    padded to the larger one.

    Args:
        plain (`list[tuple[int, float]]`): Columns and cost of passes without masks; the first is `(1, 1.0)`.
        masked (`list[tuple[int, float]]`): Columns and cost of passes with masks, drafting included.
        plain_gaps, masked_gaps (`list[tuple[int, int]]`, *optional*): The gaps in both.
    """

    plain: list[tuple[int, float]]
    masked: list[tuple[int, float]]
    plain_gaps: list[tuple[int, int]] = field(default_factory=list)
    masked_gaps: list[tuple[int, int]] = field(default_factory=list)

    def padded(self, columns: int, masks: bool) -> int:
        """The number of columns that a pass over at least so many should have."""
        gaps = self.masked_gaps if masks else self.plain_gaps
        return next((last for first, last in gaps if first < columns < last), columns)

    def of(self, columns: int, masks: bool) -> float:
        """The cost of a pass over so many columns, padded, by linear interpolation and extrapolation."""
        points, columns = self.masked if masks else self.plain, self.padded(columns, masks)
        place = min(max(bisect_left(points, (columns, 0.0)), 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[place - 1], points[place]
        return max(y0 + (y1 - y0) * (columns - x0) / (x1 - x0), points[0][1])

    def slopes(self, masks: bool) -> list[float]:
        """The costs of one more column, of passes of all sizes; at least [`LEAST_SLOPE`], because times are noisy."""
        points = self.masked if masks else self.plain
        return sorted({max(LEAST_SLOPE, (y1 - y0) / (x1 - x0)) for (x0, y0), (x1, y1) in pairwise(points)})


# Until costs are measured: typical of machines where reading the weights takes most of the time.
FIRST_GUESS = PassCosts([(1, 1.0), (2, 1.1), (17, 1.5)], [(2, 1.2), (17, 1.6)])


def measure_costs(
    run: Callable[[int, bool], None],
    plain: Sequence[int],
    masked: Sequence[int],
    agreed: Callable[[float], float] = lambda seconds: seconds,
    warm_up: bool = False,
) -> PassCosts:
    """Times passes of several sizes after a warm-up. Fast passes are timed twice, and the shorter time counts.

    Args:
        run (`Callable`): Runs a pass over so many columns, with masks among them or not, and waits for its end.
        plain, masked (`Sequence[int]`): Columns of the passes to time, without and with masks.
        agreed (`Callable`, *optional*): See [`~hf_mtp.base.distributed.agreed_seconds`].
        warm_up (`bool`, *optional*, defaults to `False`): Whether the first pass of each size takes longer. Then every
            size is run once before, and not the largest alone.
    """
    sizes = [(1, False), *((columns, False) for columns in plain), *((columns, True) for columns in masked)]
    for size in sizes[::-1] if warm_up else (sizes[-1], sizes[0]):
        run(*size)
    first = agreed(_timed(run, 1, False))
    rounds = 2 if first < SLOW_SECONDS else 1
    times = [[_timed(run, *size) for size in sizes] for _ in range(rounds)]
    seconds = {size: agreed(min(of_size)) for size, of_size in zip(sizes, zip(*times, strict=True), strict=True)}
    one = min(first, seconds[1, False])  # all else is measured by it
    plain_points, plain_gaps = _without_slow([(1, 1.0), *((size, seconds[size, False] / one) for size in plain)], 1)
    masked_points, masked_gaps = _without_slow([(size, seconds[size, True] / one) for size in masked], 0)
    return PassCosts(_rising(plain_points), _rising(masked_points), plain_gaps, masked_gaps)


def _timed(run: Callable[[int, bool], None], columns: int, masks: bool) -> float:
    start = time.perf_counter()
    run(columns, masks)
    return time.perf_counter() - start


def _without_slow(points: list[tuple[int, float]], keep: int) -> tuple[list[tuple[int, float]], list[tuple[int, int]]]:
    """Removes sizes that are slower than a larger one, but for the first `keep`. Returns the others, and the gaps."""
    best, kept, gaps = float("inf"), [], []
    for place in reversed(range(len(points))):
        columns, cost = points[place]
        if place < keep or cost * DIP <= best:
            kept.insert(0, points[place])
        else:
            before = points[place - 1][0] if place else 0
            gaps = [(before, kept[0][0]), *(gap for gap in gaps if gap[1] != kept[0][0])]
        best = min(best, cost)
    return kept, gaps


def _rising(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Removes dips, which are noise: a pass over more columns costs no less. Returns at least two points."""
    costs = list(accumulate((cost for _, cost in points), max))
    rising = list(zip((columns for columns, _ in points), costs, strict=True))
    return rising if len(rising) > 1 else [*rising, (rising[0][0] + 1, rising[0][1] * 1.02)]
