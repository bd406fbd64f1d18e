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

from ..blocks.slots import Slots, choose_slots, landing_probability, no_slots, slot_values
from .acceptance import MaskAcceptance
from .costs import StepCosts
from .drafting import NO_TOKEN, Drafts
from .lookup import Match
from .lookup_policy import LookupPolicy


@dataclass(frozen=True)
class Pass:
    """One forward pass of decoding, as it went.

    Args:
        drafts (`int`): K, drafts verified per row.
        masks (`int`): M, masks computed per row.
        tokens (`int`): Tokens that it gave, of all rows together.
        rows (`int`): Rows that were decoded.
        accepted (`list[tuple[int, int]]`): Drafts offered and drafts accepted, for each row whose drafts masks made.
        seconds (`float`): Wall clock since the pass before, drafting included.
    """

    drafts: int
    masks: int
    tokens: int
    rows: int
    accepted: list[tuple[int, int]]
    seconds: float


class Whole:
    """Whole blocks of masks.

    Args:
        linear (`bool`): On the last token of each row only.
    """

    lookups: LookupPolicy | None = None  # drafts come from masks alone

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
    acceptance of drafts; gives them to the masks whose drafts are likeliest to be used (see `slots.py`); does without
    masks while that is faster. Then it tries them again as soon as a small share of the time since has paid for the
    trial. Kept from one `generate` to the next.

    Args:
        k (`int`): Masks per block at most.
        fixed_budget (`int`, *optional*): The one number of slots to choose from, besides none.

    Attributes:
        lookups ([`LookupPolicy`] or `None`): Drafts from the text itself.
    """

    MARGIN = 1.05  # by which masks must be ahead of none
    LEARNING_RATE = 0.03
    PLAN_EVERY = 8  # passes
    REFRESH = 200  # passes with masks after which the pace without them is measured again
    REFRESH_PASSES = 3
    TRIAL = 4  # passes with masks before they may be left out again
    REST = 24  # passes without masks between trials, at least
    TRIAL_SHARE = 0.015  # of the time without masks that a trial may cost

    def __init__(self, k: int, fixed_budget: int | None = None):
        self.k, self.fixed_budget = k, fixed_budget
        self.costs, self.acceptance = StepCosts(), MaskAcceptance(k)
        # Passes of a fixed shape have no room for drafts of other lengths.
        self.lookups = None if fixed_budget else LookupPolicy(self.costs)
        self.budget = fixed_budget or 2 * k  # slots while masks are on
        self.yield_ratio = 1.0  # accepted drafts, as measured, over those that were expected
        self.maskless: deque[tuple[float, float]] = deque(maxlen=64)  # tokens per row and seconds, masks left out
        self.pace = 0.0  # tokens per second and row without masks
        self.resting = 3  # passes without masks still to do: the first ones give the pace to beat
        self.saved = 0.0  # seconds that trials may cost
        self.since_plan = self.since_rest = self.since_pace = 0

    # ---------------------------------------------------------------- choices for the next pass

    def slots(self, drafts: Drafts, k: int) -> Slots:
        """The masks of the next pass. Arguments as in [`Whole.slots`]."""
        batch, count = drafts.token_BK.shape
        device = drafts.token_BK.device
        budget = 0 if self.resting else min(self.budget, (count + 1) * k)
        if not budget:
            return no_slots(batch, count + 1, k, device)
        has_draft_BK = drafts.token_BK != NO_TOKEN
        if drafts.candidate_BKC is None:
            accept_BK = drafts.confidence_BK
        else:  # how likely a drawn draft was says little about whether it is accepted
            rates = [self.acceptance.rates[min(place, self.k - 1)] for place in range(count)]
            accept_BK = torch.tensor(rates, device=device).where(~drafts.looked_up_B[:, None], drafts.confidence_BK)
        survival_k = torch.tensor(self.acceptance.survival[:k], device=device)
        return choose_slots(slot_values(landing_probability(accept_BK * has_draft_BK), survival_k), budget)

    def fixed_drafts(self, k: int) -> int:
        """Drafts per row, used or not, of passes of two shapes: plain ones, and those with all drafts and masks."""
        return 0 if self.resting else k

    def lookups_to_take(self, found: list[Match], from_masks: list[int]) -> list[int]:
        """How many tokens of each row's match to take as its drafts, instead of those that masks would give.

        Args:
            found (`list[Match]`): One per row.
            from_masks (`list[int]`): Drafts that each row could have from masks.
        """
        if not self.costs.plain:
            return [0] * len(found)
        expected = [self.yield_ratio * sum(self.acceptance.survival[:masks]) for masks in from_masks]
        return self.lookups.choose(found, expected, max(self.pace, 1 / self.costs.plain_seconds))

    # ---------------------------------------------------------------- learning from passes

    def observe(self, done: Pass) -> None:
        """Learns from a pass."""
        self.acceptance.count(done.accepted)
        self.costs.add(done.drafts, done.masks, done.seconds)
        if done.masks:
            self.since_rest += 1
            self._learn_yield(done)
            if self.pace:
                self.saved -= done.seconds - done.tokens / done.rows / self.pace
        elif not done.accepted:
            self.maskless.append((done.tokens / done.rows, done.seconds))
            self.since_rest = 0
            self.saved += self.TRIAL_SHARE * done.seconds
            self.since_pace += 1
            if self.since_pace >= self.PLAN_EVERY or not self.pace:
                self._measure_pace()
        if self.resting:
            self.resting -= 1
            if not self.resting:
                self._try_again()
            return
        self.since_plan += 1
        if self.since_plan >= self.PLAN_EVERY:
            self.plan()

    def _learn_yield(self, done: Pass) -> None:
        """Confidences tell good drafts from bad ones and lookups add theirs: more than the averages of masks say."""
        expected = self.acceptance.expected_drafts(self.budget)
        if done.drafts and expected > 0:
            measured = done.tokens / done.rows - 1
            self.yield_ratio += self.LEARNING_RATE * (measured / expected - self.yield_ratio)

    # ---------------------------------------------------------------- masks or none

    def plan(self) -> None:
        """Sets the budget that makes most tokens per second, or rests."""
        self.since_plan = 0
        if not (self.maskless and self.costs.masked.points):
            return
        if self.since_rest >= self.REFRESH:
            self.resting, self.since_rest = self.REFRESH_PASSES, 0
            return
        self.budget = max(self._budgets(), key=lambda slots: self.tokens(slots) / self.seconds(slots))
        if self.tokens(self.budget) < self.MARGIN * self.pace * self.seconds(self.budget):
            self.resting = self.REST
        else:
            self.saved = 0.0  # what masks win is not for losing

    def _try_again(self) -> None:
        """Masks once more, if they have not lost more than they may; else rests on."""
        self.since_plan = self.PLAN_EVERY - self.TRIAL
        if not self.costs.masked.points:
            return  # they were never tried
        loss = self.seconds(self.budget) - self.tokens(self.budget) / self.pace
        if self.saved < self.TRIAL * loss:
            self.resting = self.REST

    def tokens(self, slots: int) -> float:
        """Expected tokens per row of a pass that follows one with so many slots."""
        return 1 + self.yield_ratio * self.acceptance.expected_drafts(slots)

    def seconds(self, slots: int) -> float:
        """Expected seconds of such a pass, over the pending token, drafts and masks."""
        return self.costs.seconds(1 + self.acceptance.expected_columns(slots) + slots, masks=True)

    def _measure_pace(self) -> None:
        """Tokens per second and row without masks, lookups included, slow exceptions left out."""
        self.since_pace = 0
        middle = statistics.median(seconds for _, seconds in self.maskless)
        usual = [(tokens, seconds) for tokens, seconds in self.maskless if seconds < 3 * middle]
        self.pace = sum(tokens for tokens, _ in usual) / sum(seconds for _, seconds in usual)

    def _budgets(self) -> list[int]:
        if self.fixed_budget:
            return [self.fixed_budget]
        whole = (self.k + 1) * self.k
        return sorted({min(slots, whole) for slots in (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, whole)})
