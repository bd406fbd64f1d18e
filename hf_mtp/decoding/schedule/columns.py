"""One rule for all columns of a pass: compare the expected number of tokens of a column with its cost.

A draft gives one token if it is accepted. A mask gives one token in the next pass if its anchor is the last accepted
token and the drafts of its block are right up to it; its draft then needs a column, too. A column is computed if its
expected tokens are worth more than its marginal cost. Candidates are sorted by their expected tokens, so the result is
a number of drafts and a number of masks.

Pure functions of numbers. The unit of all costs is a plain pass over one token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest

from .candidates import RankedCandidates
from .costs import PassCosts

MOST_DRAFTS, MOST_MASKS = 32, 96  # columns in one pass


@dataclass(frozen=True)
class Columns:
    """Numbers of columns for the next pass.

    Args:
        drafts, masks (`int`): Per row.
        surplus (`float`): The cost that the expected tokens are worth, less the cost of the pass.
    """

    drafts: int
    masks: int
    surplus: float


def plain_columns(rows: Sequence[RankedCandidates], costs: PassCosts, worth: float) -> Columns:
    """The best columns without masks.

    Args:
        rows (`Sequence[RankedCandidates]`): The candidates of each row.
        costs ([`PassCosts`]): What passes cost.
        worth (`float`): The cost that one more token per row is worth.
    """
    reach = _mean([row.reach for row in rows])
    return max((_plain(reach, costs, worth, slope) for slope in costs.slopes(masks=False)), key=_surplus)


def masked_columns(
    rows: Sequence[RankedCandidates], survival: Sequence[float], costs: PassCosts, worth: float
) -> Columns:
    """The best columns with at least one mask.

    Args:
        rows, costs, worth: As in [`plain_columns`].
        survival (`Sequence[float]`): Probability that the first 1, 2 ... k drafts of a block are accepted.
    """
    reach = _mean([row.reach for row in rows])
    price = verification_price(survival, costs, worth)
    slopes = costs.slopes(masks=True)
    return max((_masked(rows, reach, survival, costs, worth, slope, price) for slope in slopes), key=_surplus)


def verification_price(survival: Sequence[float], costs: PassCosts, worth: float) -> float:
    """What it costs to verify one of a block's drafts in the next pass, if as many are verified as pay best.

    The first columns after the pending token are often the dearest. All drafts share their price.

    Args:
        survival, costs, worth: As in [`masked_columns`].
    """
    best, price = -float("inf"), 0.0
    for drafts, tokens in enumerate(accumulate(survival), start=1):
        cost = costs.of(1 + drafts, masks=False) - 1.0
        if worth * tokens - cost > best:
            best, price = worth * tokens - cost, cost / drafts
    return price


def fixed_columns(
    rows: Sequence[RankedCandidates],
    survival: Sequence[float],
    costs: PassCosts,
    worth: float,
    drafts: int,
    masks: int,
) -> Columns:
    """So many columns, whatever they bring.

    Args:
        rows, survival, costs, worth: As in [`masked_columns`].
        drafts, masks (`int`): The numbers of columns.
    """
    reach = _mean([row.reach for row in rows])[:drafts]
    values = _mask_values(rows, len(reach), survival)[:masks]
    return Columns(drafts, masks, worth * (sum(reach) + sum(values)) - costs.of(1 + drafts + masks, masks=True))


def _plain(reach: list[float], costs: PassCosts, worth: float, slope: float) -> Columns:
    drafts = _first_below(reach, slope / worth)
    return Columns(drafts, 0, worth * sum(reach[:drafts]) - costs.of(1 + drafts, masks=False))


def _masked(
    rows: Sequence[RankedCandidates],
    reach: list[float],
    survival: Sequence[float],
    costs: PassCosts,
    worth: float,
    slope: float,
    price: float,
) -> Columns:
    drafts = _first_below(reach, slope / worth)
    # The draft that a mask makes needs a column in the next pass.
    values = _mask_values(rows, drafts, [value - price / worth for value in survival])
    masks = min(max(1, _first_below(values, slope / worth)), MOST_MASKS)
    surplus = worth * (sum(reach[:drafts]) + sum(values[:masks])) - costs.of(1 + drafts + masks, masks=True)
    return Columns(drafts, masks, surplus)


def _mask_values(rows: Sequence[RankedCandidates], drafts: int, survival: Sequence[float]) -> list[float]:
    """The tokens that the best, second best ... mask of a row brings, as a mean over rows."""
    return _mean(
        [sorted((land * value for land in row.landing(drafts) for value in survival), reverse=True) for row in rows]
    )


def _mean(rows: list[list[float]]) -> list[float]:
    """Means over rows of their first, second ... value. A row without one counts as 0, for its column is there."""
    return [sum(values) / len(rows) for values in zip_longest(*rows, fillvalue=0.0)]


def _first_below(values: list[float], least: float) -> int:
    """How many of the values, which do not increase, are above `least`."""
    return next((number for number, value in enumerate(values) if value <= least), len(values))


def _surplus(columns: Columns) -> float:
    return columns.surplus
