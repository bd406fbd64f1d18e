"""The adaptive schedule of `mtp_strategy="auto"`: the columns that pay for themselves, or plain decoding.

It decides by counts and by costs that were measured once, never by the time of single passes. So a busy machine does
not disturb it, and processes that share a model decide alike.

Shapes: B batch, K drafts, k masks per block.
"""

from collections import deque
from itertools import accumulate
from operator import mul

import torch

from ...layout.mask_plan import MaskPlan, choose_masks, landing_probability, mask_values, no_masks
from ..drafters.acceptance import MaskAcceptance, Rates
from ..drafters.base import Drafts
from ..outcome import Outcome
from .costs import FIRST_GUESS

NGRAM_CLASSES = 8


class AdaptiveSchedule:
    """Chooses the numbers of masks and drafts with the most expected tokens per cost.

    The unit of all costs is a plain pass over one token. While masks are slower than plain decoding, no masks are
    computed; a trial follows once 1.5 % of the cost of the passes since covers its expected loss. A model's schedule
    is kept from one `generate` to the next.

    Args:
        k (`int`): Most masks per block.
        fixed_budget (`int`, *optional*): The only number of masks to choose, besides none.

    Attributes:
        mask_acceptance ([`MaskAcceptance`]), ngram_rates ([`Rates`]): Acceptance rates, which the drafters update.
        costs ([`PassCosts`] or `None`): Measured when the model first decodes with this schedule.
    """

    MARGIN = 1.03  # the factor by which masks must be faster than plain decoding
    NGRAM_MARGIN = 1.3  # the factor by which drafts in a pass without masks must save more than they cost
    LEARNING_RATE = 0.03
    PLAN_EVERY, TRIAL = 8, 4  # passes
    REST = 24  # the fewest passes without masks between trials
    TRIAL_SHARE = 0.015

    def __init__(self, k: int, fixed_budget: int | None = None):
        self.k, self.fixed_budget, self.costs = k, fixed_budget, None
        self.mask_acceptance, self.ngram_rates = MaskAcceptance(k), Rates(NGRAM_CLASSES)
        self.budget = fixed_budget or 2 * k  # masks per pass, unless resting
        self.resting = 0  # remaining passes without masks
        self.passes_to_plan = self.TRIAL
        self.yield_ratio = 1.0  # accepted drafts over those that average rates predict
        self.maskless: deque[tuple[float, float]] = deque(maxlen=64)  # tokens per row and cost of passes without masks
        self.credit = 0.0  # cost that trials may lose

    # ---------------------------------------------------------------- choices

    def plan_masks(self, drafts: Drafts, k: int) -> MaskPlan:
        """The mask plan of the next pass. Arguments as in [`FixedSchedule.plan_masks`]."""
        batch, count = drafts.token_BK.shape
        device = drafts.token_BK.device
        budget = 0 if self.resting else min(self.budget, (count + 1) * k)
        if not budget:
            return no_masks(batch, count + 1, k, device)
        accept_BK = drafts.confidence_BK * (drafts.token_BK >= 0)
        survival_k = torch.tensor(self.mask_acceptance.survival[:k], device=device)
        return choose_masks(mask_values(landing_probability(accept_BK), survival_k), budget)

    def choose(self, expected: list[list[list[float]]]) -> list[list[int]]:
        """Numbers of drafts by drafter and row: for each row the best drafter's, as far as they are worth their cost.

        Args:
            expected (`list`): The result of `expect` of each drafter.
        """
        survivals = [[list(accumulate(row, mul)) for row in rows] for rows in expected]
        rows = list(zip(*survivals, strict=True))
        best = [max(range(len(row)), key=lambda drafter, row=row: sum(row[drafter])) for row in rows]
        length = self._length([row[drafter] for row, drafter in zip(rows, best, strict=True)])
        return [
            [
                min(len(row[drafter]), length) if chosen == drafter else 0
                for row, chosen in zip(rows, best, strict=True)
            ]
            for drafter in range(len(expected))
        ]

    def _length(self, survivals: list[list[float]]) -> int:
        """The number of drafts per row that saves most. A column costs the same however many rows use it."""
        costs, masks = self.costs or FIRST_GUESS, 0 if self.resting else self.budget
        token_value = 1 / (self._plain_throughput() * len(survivals))
        base = 1 + masks
        saved, best, gain = 0.0, 0, 0.0
        for length in range(1, max(map(len, survivals), default=0) + 1):
            gain += sum(row[length - 1] for row in survivals if len(row) >= length) * token_value
            extra = costs.of(base + length, masks > 0) - costs.of(base, masks > 0)
            margin = 1.0 if masks else self.NGRAM_MARGIN
            if gain - margin * extra > saved:
                saved, best = gain - margin * extra, length
        return best

    def fixed_drafts(self, k: int) -> int:
        """Drafts per row, used or not, where passes have one of two shapes: plain, or with all drafts and masks."""
        return 0 if self.resting else k

    # ---------------------------------------------------------------- learning

    def observe(self, outcome: Outcome) -> None:
        """Updates budget, credit and averages after a pass."""
        costs = self.costs or FIRST_GUESS
        tokens, masks = sum(outcome.verified.new_tokens) / len(outcome.sequences), outcome.plan.masks
        cost = costs.of(outcome.columns, masks > 0)
        if masks:
            self.credit -= cost - tokens / self._plain_throughput()
            self._learn_yield(tokens, any(outcome.verified.offered))
        else:
            self.credit += self.TRIAL_SHARE * cost
            self.maskless.append((tokens, cost))
        if self.resting:
            self.resting -= 1
            if not self.resting:
                self._try_again()
            return
        self.passes_to_plan -= 1
        if self.passes_to_plan <= 0:
            self.plan()

    def _learn_yield(self, tokens: float, had_drafts: bool) -> None:
        """Corrects the prediction by average rates, which ignores confidences and drafts from n-grams."""
        expected = self.mask_acceptance.expected_drafts(self.budget)
        if had_drafts and expected > 0:
            self.yield_ratio += self.LEARNING_RATE * ((tokens - 1) / expected - self.yield_ratio)

    def plan(self) -> None:
        """Sets the budget with the most expected tokens per cost, or starts a rest."""
        self.passes_to_plan = self.PLAN_EVERY
        self.budget = max(self._budgets(), key=self.throughput)
        if self.throughput(self.budget) < self.MARGIN * self._plain_throughput():
            self.resting = self.REST
        else:
            self.credit = 0.0  # trials may not spend what masks gained

    def _try_again(self) -> None:
        """Starts a trial if the credit covers its expected loss, or else the next rest."""
        self.passes_to_plan = self.TRIAL
        masks = self.budget
        loss = self.cost(masks) - self.tokens(masks) / self._plain_throughput()
        if self.credit < self.TRIAL * loss:
            self.resting = self.REST

    def throughput(self, masks: int) -> float:
        """Expected tokens per row and unit of cost, with so many masks per pass."""
        return self.tokens(masks) / self.cost(masks)

    def tokens(self, masks: int) -> float:
        """Expected tokens per row of a pass that follows one with so many masks."""
        return 1 + self.yield_ratio * self.mask_acceptance.expected_drafts(masks)

    def cost(self, masks: int) -> float:
        """Expected cost of such a pass, over the pending token, drafts and masks."""
        columns = 1 + self.mask_acceptance.expected_columns(masks) + masks
        return (self.costs or FIRST_GUESS).of(columns, masks=True)

    def _plain_throughput(self) -> float:
        """Tokens per row and unit of cost without masks, drafts from n-grams included."""
        cost = sum(cost for _, cost in self.maskless)
        return max(1.0, sum(tokens for tokens, _ in self.maskless) / cost) if cost else 1.0

    def _budgets(self) -> list[int]:
        if self.fixed_budget:
            return [self.fixed_budget]
        whole = (self.k + 1) * self.k
        return sorted({min(masks, whole) for masks in (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, whole)})
