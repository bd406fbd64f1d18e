"""The cost of forward passes on this machine, by their number of columns. It is measured once per model."""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

PLAIN_COLUMNS = (5, 17)
MASKED_COLUMNS = (3, 9, 17, 41)
SLOW_SECONDS = 0.05  # if a plain pass takes longer, each size is timed only once


@dataclass(frozen=True)
class PassCosts:
    """The cost of passes, in units of a plain pass over one token.

    Args:
        plain (`list[tuple[int, float]]`): Columns and cost of passes without masks; the first is `(1, 1.0)`.
        masked (`list[tuple[int, float]]`): Columns and cost of passes with masks, drafting included.
    """

    plain: list[tuple[int, float]]
    masked: list[tuple[int, float]]

    def of(self, columns: float, masks: bool) -> float:
        """The cost of a pass over so many columns, by linear interpolation and extrapolation."""
        points = self.masked if masks else self.plain
        place = min(max(bisect_left(points, (columns, 0.0)), 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[place - 1], points[place]
        return max(y0 + (y1 - y0) * (columns - x0) / (x1 - x0), points[0][1])


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
    rounds = 2 if agreed(_timed(run, 1, False)) < SLOW_SECONDS else 1
    times = [[_timed(run, *size) for size in sizes] for _ in range(rounds)]
    seconds = {size: agreed(min(of_size)) for size, of_size in zip(sizes, zip(*times, strict=True), strict=True)}
    one = seconds[1, False]
    return PassCosts(
        _rising([(1, 1.0), *((columns, seconds[columns, False] / one) for columns in plain)]),
        _rising([(columns, seconds[columns, True] / one) for columns in masked]),
    )


def _timed(run: Callable[[int, bool], None], columns: int, masks: bool) -> float:
    start = time.perf_counter()
    run(columns, masks)
    return time.perf_counter() - start


def _rising(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Removes dips, which are noise: a pass over more columns costs no less. Returns at least two points."""
    costs = list(accumulate((cost for _, cost in points), max))
    rising = list(zip((columns for columns, _ in points), costs, strict=True))
    return rising if len(rising) > 1 else [*rising, (rising[0][0] + 1, rising[0][1] * 1.02)]
