"""The adaptive schedule of `mtp_strategy="auto"`: the columns that are worth their cost, or plain decoding.

Its decisions depend on acceptance counts and on costs that were measured once, never on the time of single passes. So
a busy machine does not disturb it, and processes that share a model make the same decisions.

Shapes: B batch, K drafts, k masks per block.
"""

import torch

from ...adapter.ngram_table import NgramTable
from ...layout.mask_plan import MaskPlan, choose_masks, landing_probability, mask_values, no_masks
from ..drafters.acceptance import Calibration, MaskAcceptance, Rates
from ..drafters.base import NO_TOKEN, Drafts
from ..drafters.lookup import LookupDrafter
from ..drafters.ngrams import NgramDrafter
from ..drafters.table import TableDrafter
from ..outcome import MASK_DRAFTER, Origin, Outcome
from .candidates import CandidateTree, RankedCandidates
from .columns import MOST_DRAFTS, Columns, fixed_columns, masked_columns, plain_columns
from .costs import FIRST_GUESS

NGRAM_PRIORS = (0.25, 0.5, 0.6, 0.65, 0.7, 0.7, 0.7, 0.7)  # by the length of the match, typical of answers


class AdaptiveSchedule:
    """Chooses the drafts and masks of each pass by their expected tokens and their cost.

    The unit of all costs is a plain pass over one token. The value of a token is its cost at the throughput of the
    last passes. While passes with masks are expected to be slower than those without, no masks are computed; a trial
    runs once 1.5 % of the cost of the passes since then covers its expected loss. A model's schedule is kept from one
    `generate` to the next.

    Args:
        k (`int`): Most masks per block.
        fixed_budget (`int`, *optional*): The only number of masks to choose, besides none.

    Attributes:
        mask_acceptance ([`MaskAcceptance`]), ngram_rates ([`Rates`]), table_calibration ([`Calibration`]): Acceptance
            rates, which the drafters update.
        costs ([`PassCosts`] or `None`): Measured when the model first decodes with this schedule.
        masks (`int`): Masks of the next pass.
    """

    MARGIN = 0.03  # how much more masks must be worth than passes without them, in plain passes
    MEMORY = 0.98  # per pass, of tokens and costs
    TRIAL = 4  # passes
    REST = 24  # the fewest passes without masks between trials
    TRIAL_SHARE = 0.015
    TRIAL_WEIGHT = 8  # drafts: the text may have changed since masks were last tried

    def __init__(self, k: int, fixed_budget: int | None = None):
        self.k, self.fixed_budget, self.costs = k, fixed_budget, None
        self.mask_acceptance, self.ngram_rates = MaskAcceptance(k), Rates(NGRAM_PRIORS)
        self.table_calibration = Calibration()
        self.masks = fixed_budget or k
        self.trial, self.resting = self.TRIAL, 0  # remaining passes with masks on trial, and without masks
        self.credit = 0.0  # cost that trials may lose
        self.tokens = self.cost = 5.0  # of the last passes, per row, as running sums

    def lookups(self, table: NgramTable | None, vocab_size: int) -> list[LookupDrafter]:
        """Drafters that need no masks, for one call. What they learn stays with the schedule.

        Args:
            table ([`NgramTable`], *optional*): The adapter's n-gram table.
            vocab_size (`int`): Tokens of the base's vocabulary.

        Raises:
            ValueError: The table has tokens that the base does not have.
        """
        if table is not None:
            table.refuse_other_base(vocab_size)
        tables = [TableDrafter(table, self.table_calibration)] if table is not None else []
        return [NgramDrafter(self.ngram_rates), *tables]

    # ---------------------------------------------------------------- choices

    def plan_masks(self, drafts: Drafts, k: int) -> MaskPlan:
        """The mask plan of the next pass. Arguments as in [`~hf_mtp.decoding.schedule.base.Schedule.plan_masks`]."""
        batch, count = drafts.token_BK.shape
        device = drafts.token_BK.device
        budget = min(self.masks, (count + 1) * k)
        if not budget:
            return no_masks(batch, count + 1, k, device)
        accept_BK = drafts.confidence_BK * (drafts.token_BK >= 0)
        survival_k = torch.tensor(self.mask_acceptance.survival[:k], device=device)
        landing_BR = landing_probability(accept_BK, drafts.parent_BK)
        return choose_masks(mask_values(landing_BR, survival_k), budget)

    def counts(self, expected: list[list[list[float]]]) -> list[list[int]]:
        """How many drafts each drafter proposes for each row: all that it can."""
        return [[len(row) for row in rows] for rows in expected]

    def choose(
        self, expected: list[list[list[float]]], proposals: list[Drafts | None], device: torch.device
    ) -> tuple[Drafts, list[list[Origin]]]:
        """The drafts that the next pass verifies, and where they come from. Also chooses the number of its masks."""
        rows = [self._candidates(row, expected, proposals).best(MOST_DRAFTS) for row in range(len(expected[0]))]
        columns = self._columns(rows)
        count = 1 + columns.drafts + columns.masks
        padding = (self.costs or FIRST_GUESS).padded(count, columns.masks > 0) - count
        # Columns that cost nothing: masks rather than nothing.
        more = min(padding, (1 + columns.drafts) * self.k - columns.masks) if columns.masks else 0
        self.masks = columns.masks + more
        # Without drafts, there may be no position left for an empty one.
        empty = padding - more if columns.drafts else 0
        drafts = drafts_of(rows, columns.drafts, columns.drafts + empty, device)
        return drafts, [row.origins[: columns.drafts] for row in rows]

    def fixed_drafts(self, k: int) -> int:
        """Drafts per row, used or not, where passes have one of two shapes: plain, or with all drafts and masks."""
        return k if self.masks else 0

    def _candidates(
        self, row: int, expected: list[list[list[float]]], proposals: list[Drafts | None]
    ) -> CandidateTree:
        tree = CandidateTree()
        for number, (rates, drafts) in enumerate(zip(expected, proposals, strict=True)):
            if drafts is None or not rates[row]:
                continue
            if number != MASK_DRAFTER:
                tree.add_tree(number, drafts.tokens[row], drafts.parents[row], rates[row])
                continue
            of_place, acceptance = drafts.confidences[row][: len(rates[row])], self.mask_acceptance
            known = acceptance.rates_of(of_place)
            siblings = drafts.siblings[row] if drafts.sibling_BKC is not None else None
            tree.add_chain(number, drafts.tokens[row], known, siblings, acceptance.sibling_rates_of(known))
        return tree

    def _columns(self, rows: list[RankedCandidates]) -> Columns:
        """The best columns, those with masks during a trial."""
        costs, survival = self.costs or FIRST_GUESS, self.mask_acceptance.survival
        worth = min(1.0, self.cost / self.tokens)
        if self.fixed_budget:
            plain = Columns(0, 0, -costs.of(1, masks=False))
            masked = fixed_columns(rows, survival, costs, worth, self.k, self.fixed_budget)
        else:
            plain = plain_columns(rows, costs, worth)
            masked = masked_columns(rows, survival, costs, worth)
        return masked if self._takes_masks(masked.surplus - plain.surplus) else plain

    def _takes_masks(self, gain: float) -> bool:
        """Whether the next pass has masks: if they gain enough, or on trial."""
        if gain > self.MARGIN:
            self.trial, self.resting, self.credit = 0, self.REST, 0.0  # trials may not spend what masks gained
            return True
        loss = max(0.0, -gain)
        if not self.trial and not self.resting and self.credit >= self.TRIAL * loss:
            self.trial = self.TRIAL
            self.mask_acceptance.forget(self.TRIAL_WEIGHT)
        if self.trial:
            self.trial, self.resting = self.trial - 1, self.REST
            self.credit -= loss
            return True
        self.resting = max(0, self.resting - 1)
        return False

    # ---------------------------------------------------------------- learning

    def observe(self, outcome: Outcome) -> None:
        """Updates credit and averages after a pass."""
        tokens = sum(outcome.verified.new_tokens) / len(outcome.sequences)
        cost = (self.costs or FIRST_GUESS).of(outcome.columns, outcome.plan.masks > 0)
        if not outcome.plan.masks:
            self.credit += self.TRIAL_SHARE * cost
        self.tokens, self.cost = self.tokens * self.MEMORY + tokens, self.cost * self.MEMORY + cost


def drafts_of(rows: list[RankedCandidates], count: int, width: int, device: torch.device) -> Drafts:
    """The first candidates of each row as drafts.

    Args:
        rows (`list[RankedCandidates]`): The candidates of each row.
        count (`int`): Most drafts of a row.
        width (`int`): K, with places that stay empty. A row without a draft for a place has an empty one, too.
        device (`torch.device`): Device of the drafts.
    """
    longest = max(len(row.tokens) for row in rows)
    count, width = min(count, longest), width - max(0, count - longest)

    def padded(values: list, value) -> list:
        found = values[:count]
        return found + [value] * (width - len(found))

    tokens = [padded(row.tokens, NO_TOKEN) for row in rows]
    confidences = [padded(row.rates(count), 0.0) for row in rows]
    parents = [padded(row.parents, 0) for row in rows]
    # Empty places at the end follow the pending token, so that they take no later position.
    is_chain = width == count and all(
        parent == place for row in rows for place, parent in enumerate(row.parents[:count])
    )
    return Drafts(
        torch.tensor(tokens, dtype=torch.long, device=device).view(len(rows), width),
        torch.tensor(confidences, device=device).view(len(rows), width),
        None if is_chain else torch.tensor(parents, device=device),
    )
