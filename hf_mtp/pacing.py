"""How many masks a pass computes, and on which tokens: the strategies of decoding.

`Whole` computes whole blocks, on every regular token (quadratic decoding) or on the last one (linear). `Pacer` buys
masks where they are likely to pay, by what passes cost and what drafts achieved so far on this machine, and none where
plain decoding is faster.

Shapes: B batch, K drafts, R = K + 1 regular tokens, k masks per block, M slots.
"""

import statistics
from collections import deque
from dataclasses import dataclass, replace

import torch

from .drafting import NO_TOKEN, Drafts
from .slots import Slots, choose_slots, landing_probability, slot_values


@dataclass(frozen=True)
class Pass:
    """One forward pass of decoding, as it went.

    Args:
        drafts (`int`): K, drafts verified per row.
        masks (`int`): M, masks computed per row.
        accepted (`list[tuple[int, int]]`): Drafts offered and drafts accepted, for each row that had any.
        seconds (`float`): Wall clock since the pass before, drafting included.
    """

    drafts: int
    masks: int
    accepted: list[tuple[int, int]]
    seconds: float


class Whole:
    """Whole blocks of masks.

    Args:
        linear (`bool`): On the last token of each row only.
    """

    def __init__(self, linear: bool):
        self.linear = linear

    def slots(self, drafts: Drafts, k: int) -> Slots:
        """The masks of the next pass.

        Args:
            drafts ([`Drafts`]): What the pass verifies.
            k (`int`): Masks per block at most; may be 0.
        """
        batch, count = drafts.token_BK.shape
        last_B = (drafts.token_BK != NO_TOKEN).sum(dim=1)
        anchor_R = torch.arange(count + 1, device=last_B.device)
        wanted_BR = anchor_R == last_B[:, None] if self.linear else anchor_R <= last_B[:, None]
        value_BRk = wanted_BR[:, :, None].float().expand(-1, -1, k)
        slots = choose_slots(value_BRk, k if self.linear else (count + 1) * k)
        return replace(slots, is_chain=slots.is_chain or (self.linear and batch == 1))

    def fixed_drafts(self, k: int) -> int:
        """Drafts per row, used or not, of passes that all have the same shape."""
        return k

    def observe(self, done: Pass) -> None:
        """Nothing to learn."""


class Pacer:
    """Masks where they pay.

    Chooses the number of slots that makes most tokens per second, from the measured seconds of passes and the measured
    acceptance of drafts; gives them to the masks whose drafts are likeliest to be used (see `slots.py`); decodes
    plainly while that is faster, and then tries again at growing distances. Kept from one `generate` to the next.

    Args:
        k (`int`): Masks per block at most.
        fixed_budget (`int`, *optional*): The one number of slots to choose from, besides none.
    """

    MARGIN = 1.04  # by which masks must be ahead of plain decoding
    REFRESH = 200  # passes after which the price of a plain pass is measured again
    PLAN_EVERY = 8  # passes
    LEARNING_RATE = 0.03
    TRIAL = 4  # passes with masks before plain decoding may be resumed
    FIRST_REST, LONGEST_REST = 24, 1024  # plain passes between trials

    def __init__(self, k: int, fixed_budget: int | None = None):
        self.k, self.fixed_budget = k, fixed_budget
        self.costs, self.acceptance = StepCosts(), Acceptance(k)
        self.budget = fixed_budget or 2 * k  # slots while masks are on
        self.yield_ratio = 1.0  # accepted drafts, as measured, over those that were expected
        self.plain_left = 3  # plain passes still to do: the first ones give the price to beat
        self.rest = self.FIRST_REST
        self.since_plan = self.since_plain = 0

    def slots(self, drafts: Drafts, k: int) -> Slots:
        """The masks of the next pass. Arguments as in [`Whole.slots`]."""
        batch, count = drafts.token_BK.shape
        device = drafts.token_BK.device
        budget = 0 if self.plain_left else min(self.budget, (count + 1) * k)
        if not budget:
            return choose_slots(torch.zeros(batch, count + 1, k, device=device), 0)
        has_draft_BK = drafts.token_BK != NO_TOKEN
        if drafts.candidate_BKC is None:
            accept_BK = drafts.confidence_BK
        else:  # how likely a drawn draft was says little about whether it is accepted
            accept_BK = torch.tensor(self.acceptance.rates[:count], device=device).expand(batch, -1)
        survival_k = torch.tensor(self.acceptance.survival[:k], device=device)
        return choose_slots(slot_values(landing_probability(accept_BK * has_draft_BK), survival_k), budget)

    def fixed_drafts(self, k: int) -> int:
        """Drafts per row, used or not, of passes of two shapes: plain ones, and those with all drafts and masks."""
        return 0 if self.plain_left else k

    def observe(self, done: Pass) -> None:
        """Learns from a pass."""
        self.acceptance.count(done.accepted)
        if done.drafts == done.masks == 0:
            self.costs.plain.append(done.seconds)
            self.since_plain = 0
        else:
            self.costs.masked.append((1 + done.drafts + done.masks, done.seconds))
            self.since_plain += 1
            self._learn_yield(done)
        if self.plain_left:
            self.plain_left -= 1
            if not self.plain_left:
                self.since_plan = self.PLAN_EVERY - self.TRIAL
            return
        self.since_plan += 1
        if self.since_plan >= self.PLAN_EVERY:
            self.plan()

    def _learn_yield(self, done: Pass) -> None:
        """Confidences tell good drafts from bad ones, so that slots bring more than the averages say."""
        expected = self.acceptance.expected_drafts(self.budget)
        if done.accepted and done.drafts and expected > 0:
            measured = sum(accepted for _, accepted in done.accepted) / len(done.accepted)
            self.yield_ratio += self.LEARNING_RATE * (measured / expected - self.yield_ratio)

    def plan(self) -> None:
        """Sets the budget that makes most tokens per second, or rests."""
        self.since_plan = 0
        if not (self.costs.plain and self.costs.masked):
            return
        if self.since_plain >= self.REFRESH:
            self.plain_left, self.since_plain = 2, 0
            return
        self.budget, rate = max(
            ((slots, self.tokens(slots) / self.costs.seconds(self.columns(slots))) for slots in self._budgets()),
            key=lambda option: option[1],
        )
        if rate * self.costs.plain_seconds < self.MARGIN:
            self.plain_left, self.rest = self.rest, min(2 * self.rest, self.LONGEST_REST)
        else:
            self.rest = self.FIRST_REST

    def tokens(self, slots: int) -> float:
        """Expected tokens of a pass that follows one with so many slots."""
        return 1 + self.yield_ratio * self.acceptance.expected_drafts(slots)

    def columns(self, slots: int) -> float:
        """Expected columns of such a pass: the pending token, drafts and masks."""
        return 1 + sum(landing for _, landing in self.acceptance.best_values[:slots]) + slots

    def _budgets(self) -> list[int]:
        if self.fixed_budget:
            return [self.fixed_budget]
        whole = (self.k + 1) * self.k
        return sorted({min(slots, whole) for slots in (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, whole)})


class Acceptance:
    """How often the first, second ... draft was accepted where all before it were; old passes count less and less.

    Args:
        k (`int`): Drafts at most.
    """

    MEMORY = 0.98
    # Before anything was seen: as if so many drafts had been verified. High enough that deep masks get tried.
    PRIOR_RATE, PRIOR_COUNT = 0.6, 2.0

    def __init__(self, k: int):
        self.offered = [self.PRIOR_COUNT] * k
        self.accepted = [self.PRIOR_RATE * self.PRIOR_COUNT] * k
        self.rates: list[float]
        self.survival: list[float]  # of the first 1, 2 ... k drafts together
        self.best_values: list[tuple[float, float]]  # of each mask of each block, best first: value, landing
        self._update()

    def count(self, rows: list[tuple[int, int]]) -> None:
        """Counts, for each row, drafts offered and drafts accepted."""
        for offered, accepted in rows:
            for position in range(min(offered, accepted + 1)):
                self.offered[position] = self.offered[position] * self.MEMORY + 1
                self.accepted[position] = self.accepted[position] * self.MEMORY + (position < accepted)
        if rows:
            self._update()

    def expected_drafts(self, slots: int) -> float:
        """Accepted drafts of a pass that follows one with so many slots, by averages alone."""
        return sum(value for value, _ in self.best_values[:slots])

    def _update(self) -> None:
        self.rates = [accepted / offered for accepted, offered in zip(self.accepted, self.offered, strict=True)]
        self.survival, reached = [], 1.0
        for rate in self.rates:
            reached *= rate
            self.survival.append(reached)
        landings = [
            reached * (1 - rate) for reached, rate in zip([1.0, *self.survival[:-1]], self.rates, strict=True)
        ] + [self.survival[-1]]
        self.best_values = sorted(
            ((landing * s, landing) for landing in landings for s in self.survival), reverse=True
        )


class StepCosts:
    """Seconds of a pass: measured for plain ones, a straight line in the number of columns for the others."""

    def __init__(self):
        self.plain: deque[float] = deque(maxlen=15)
        self.masked: deque[tuple[float, float]] = deque(maxlen=64)

    @property
    def plain_seconds(self) -> float:
        return statistics.median(self.plain)

    def seconds(self, columns: float) -> float:
        """Expected seconds of a pass over so many columns."""
        middle = statistics.median(seconds for _, seconds in self.masked)
        usual = [(columns, seconds) for columns, seconds in self.masked if seconds < 2 * middle]
        xs, ys = zip(*usual, strict=True)
        slope = 0.0
        if len(set(xs)) > 1:
            slope = max(0.0, statistics.linear_regression(xs, ys).slope)
        return max(statistics.fmean(ys) + slope * (columns - statistics.fmean(xs)), 1e-9)
