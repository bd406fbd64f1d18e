"""Schedules: masks where they pay by the given costs, rests where they do not, decided by counts alone."""

import itertools
import math
import random
import threading
import time

import pytest
import torch

from hf_mtp.decoding.drafters.acceptance import MaskAcceptance, Rates
from hf_mtp.decoding.drafters.base import NO_TOKEN, Drafts, no_drafts
from hf_mtp.decoding.outcome import Outcome, Verified
from hf_mtp.decoding.schedule.adaptive import AdaptiveSchedule
from hf_mtp.decoding.schedule.candidates import CandidateTree
from hf_mtp.decoding.schedule.columns import masked_columns
from hf_mtp.decoding.schedule.costs import PassCosts
from hf_mtp.decoding.schedule.fixed import FixedSchedule
from hf_mtp.decoding.schedule.store import ScheduleStore

CPU = torch.device("cpu")


def costs(fixed: float, column: float) -> PassCosts:
    """A plain pass costs 1 and each further column of it `column`; masks make a pass `fixed` times as dear."""
    return PassCosts([(1, 1.0), (101, 1 + 100 * column)], [(1, fixed + column), (101, fixed + 101 * column)])


def drafts_of(confidences: list[list[float]]) -> Drafts:
    longest = max(map(len, confidences))
    rows = [row + [0.0] * (longest - len(row)) for row in confidences]
    tokens = [[7] * len(row) + [NO_TOKEN] * (longest - len(row)) for row in confidences]
    return Drafts(
        torch.tensor(tokens, dtype=torch.long).view(len(rows), longest), torch.tensor(rows).view(len(rows), -1)
    )


def choice(schedule: AdaptiveSchedule, *expected: list[list[float]]) -> Drafts:
    """The schedule's choice among drafters that expect so much for each row, and never propose the same token."""
    proposals = [
        Drafts(100 * number + drafts_of(rows).token_BK, drafts_of(rows).confidence_BK)
        for number, rows in enumerate(expected, start=1)
    ]
    return schedule.choose([*map(list, expected)], proposals, CPU)[0]


class Decoding:
    """Decodes no text: drafts of masks are right by chance, at the given rates, with passes of the given costs."""

    def __init__(self, schedule: AdaptiveSchedule, rates: list[float], seed: int = 0):
        self.schedule, self.rates, self.draw = schedule, rates, random.Random(seed)
        self.proposed, self.drafts, self.budgets, self.tokens, self.cost = 0, 0, [], 0, 0.0

    def run(self, passes: int) -> "Decoding":
        for _ in range(passes):
            self.step()
        return self

    def step(self) -> None:
        schedule, offered = self.schedule, self.drafts
        plan = schedule.plan_masks(drafts_of([schedule.mask_acceptance.rates[:offered]]), schedule.k)
        right = 0
        while right < self.proposed and self.draw.random() < self.rates[right]:
            right += 1
        accepted = min(offered, right)
        landed = torch.tensor([accepted])
        verified = Verified([[7] * (1 + accepted)], [offered], [accepted], torch.tensor([7]), landed, [False])
        columns = 1 + offered + plan.masks
        self.budgets.append(plan.masks)
        self.tokens += 1 + accepted
        self.cost += schedule.costs.of(columns, plan.masks > 0)
        compared = min(self.proposed, 1 + accepted)  # proposals count whether or not they were verified
        if compared:
            schedule.mask_acceptance.count([(compared, min(compared, right))])
        outcome = Outcome([None], columns, plan, None, verified, [[]])
        schedule.observe(outcome)
        expected = schedule.mask_acceptance.rates[: outcome.next_masks[0]]
        self.proposed, self.drafts = len(expected), choice(schedule, [expected]).count


def adaptive(fixed: float = 1.0, column: float = 0.01, k: int = 4, budget: int | None = None) -> AdaptiveSchedule:
    schedule = AdaptiveSchedule(k, budget)
    schedule.costs = costs(fixed, column)
    return schedule


# ---------------------------------------------------------------- adaptive: masks


def test_masks_where_they_pay():
    decoding = Decoding(adaptive(), [0.8] * 4).run(300)
    assert sum(map(bool, decoding.budgets)) > 280
    assert decoding.tokens > 2 * decoding.cost


@pytest.mark.parametrize(
    ("rate", "fixed"), [(0.0, 1.0), (0.3, 2.0), (0.8, 6.0), (0.3, 10.0)], ids=["bad_drafts", "bad", "dear", "dearer"]
)
def test_where_they_do_not_pay_trials_cost_their_share(rate, fixed):
    decoding = Decoding(adaptive(fixed, 0.05), [rate] * 4).run(300)
    tokens, cost = decoding.tokens, decoding.cost  # the first trial costs what it costs
    decoding.run(6000)
    assert (decoding.cost - cost) / (decoding.tokens - tokens) < 1 + 1.5 * AdaptiveSchedule.TRIAL_SHARE
    assert cost / tokens < 2.0
    tried = sum(map(bool, decoding.budgets[300:]))
    assert 0 < tried < 1000  # now and then


def test_masks_come_back_when_drafts_get_better():
    decoding = Decoding(adaptive(1.2, 0.02), [0.0] * 4).run(1000)
    assert sum(map(bool, decoding.budgets[500:])) < 100
    decoding.rates = [0.9] * 4
    decoding.run(3000)
    assert sum(map(bool, decoding.budgets[-200:])) > 180


def test_a_dearer_column_buys_fewer_masks():
    cheap, dear = (Decoding(adaptive(column=column), [0.8] * 4).run(200).budgets for column in (0.001, 0.05))
    assert sum(dear) < 0.7 * sum(cheap)


@pytest.mark.parametrize("rates", [[0.59, 0.56, 0.65, 0.8], [0.5, 0.5, 0.5, 0.5]])
def test_masks_pay_for_the_pass_that_verifies_their_drafts(rates):
    # The first columns after the pending token are the dearest, as in float32 on a CPU.
    schedule = AdaptiveSchedule(4)
    schedule.costs = PassCosts([(1, 1.0), (5, 1.8), (17, 2.15)], [(3, 1.47), (9, 2.52), (17, 2.62), (41, 3.82)])
    decoding = Decoding(schedule, rates).run(3000)
    assert decoding.cost / decoding.tokens < 1.03


def test_it_decides_by_counts_alone(monkeypatch):
    def no_clock():
        raise AssertionError("asked for the time")

    for name in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(time, name, no_clock)
    one, other = (Decoding(adaptive(1.3, 0.03), [0.6] * 4).run(400) for _ in range(2))
    assert one.budgets == other.budgets
    assert len(set(one.budgets)) > 2
    assert vars(one.schedule.mask_acceptance.counts) == vars(other.schedule.mask_acceptance.counts)


def test_masks_go_where_the_row_is_likely_to_land():
    schedule = adaptive()
    schedule.masks = 2
    sure, doubtful = (schedule.plan_masks(drafts_of([[rate] * 3]), 4).anchor_BM.tolist() for rate in (0.99, 0.01))
    assert (sure, doubtful) == ([[3, 3]], [[0, 0]])


def test_masks_hang_on_alternatives_too():
    schedule = adaptive()
    schedule.masks = 2
    drafts = Drafts(torch.tensor([[7, 8]]), torch.tensor([[0.2, 0.75]]), torch.tensor([[0, 0]]))
    assert schedule.plan_masks(drafts, 4).anchor_BM.tolist() == [[2, 2]]


def test_no_more_masks_than_places():
    schedule = adaptive()
    schedule.masks = 6
    assert schedule.plan_masks(no_drafts(2, CPU), 4).masks == 4
    assert schedule.plan_masks(no_drafts(2, CPU), 4).is_chain
    assert schedule.plan_masks(no_drafts(2, CPU), 0).masks == 0
    schedule.masks = 0
    assert schedule.plan_masks(drafts_of([[0.9, 0.9]]), 4).masks == 0


def test_a_fixed_budget_is_all_or_nothing():
    schedule = adaptive(fixed=6.0, k=3, budget=6)
    assert schedule.fixed_drafts(3) == 3
    budgets = Decoding(schedule, [0.2] * 3).run(100).budgets
    assert set(budgets) <= {0, 3, 6}  # 3 behind the prompt, where there is one place only
    assert budgets[-1] == 0
    assert schedule.fixed_drafts(3) == 0


# ---------------------------------------------------------------- adaptive: drafts


def resting(column: float) -> AdaptiveSchedule:
    """A schedule that computes no masks, because these cost too much, and whose tokens are worth a plain pass."""
    schedule = adaptive(fixed=90.0, column=column)
    schedule.trial, schedule.resting = 0, 99
    return schedule


def test_drafts_are_verified_while_they_are_worth_their_column():
    assert choice(resting(0.1), [[0.9, 0.9, 0.1, 0.9]]).count == 2
    assert choice(resting(0.1), [[0.11, 0.9, 0.9]]).count == 1
    assert choice(resting(0.1), [[0.09, 0.9]]).count == 0


def test_rows_share_the_cost_of_a_column():
    assert choice(resting(0.1), [[0.15], [0.0]]).count == 0
    assert choice(resting(0.1), [[0.15], [0.15]]).count == 1


def test_passes_of_slow_sizes_are_padded():
    schedule = resting(0.25)
    schedule.costs = PassCosts([(1, 1.0), (2, 1.25), (9, 1.9)], schedule.costs.masked, [(2, 9)])
    drafts = choice(schedule, [[0.9, 0.9, 0.9], [0.9]])
    assert drafts.token_BK.tolist() == [[107] * 3 + [-1] * 5, [107] + [-1] * 7]
    assert drafts.parents_BK.tolist() == [[0, 1, 2] + [0] * 5, [0] * 8]
    assert choice(schedule, [[0.9], []]).count == 1
    assert choice(schedule, [[0.9, 0.9, 0.1]]).token_BK.tolist() == [[107, 107] + [-1] * 6]
    with_masks = AdaptiveSchedule(4)
    with_masks.costs = PassCosts([(1, 1.0), (2, 1.1)], [(3, 1.1), (17, 1.3)], [], [(3, 17)])
    assert 1 + choice(with_masks, [[0.9, 0.9]]).count + with_masks.masks == 17
    assert choice(with_masks, [[]]).count == 0 and with_masks.masks == 4  # no more masks than places, no empty drafts


def test_drafts_of_two_drafters_are_alternatives():
    drafts = choice(resting(0.1), [[0.5, 0.5], []], [[0.4, 0.9, 0.9], [0.9, 0.9]])
    # The row's 0.5 and its 0.5 * 0.5; the other's 0.4, 0.36 and 0.324. The second row has one source.
    assert drafts.token_BK.tolist() == [[107, 207, 207, 207, 107], [207, 207, -1, -1, -1]]
    assert drafts.parent_BK.tolist() == [[0, 0, 2, 3, 1], [0, 1, 0, 0, 0]]
    torch.testing.assert_close(drafts.confidence_BK[0], torch.tensor([0.5, 0.4, 0.9, 0.9, 0.5]))


def test_siblings_are_verified_while_they_are_worth_their_column():
    schedule = resting(0.1)
    schedule.mask_acceptance.sibling_counts = [Rates([0.6]), Rates([0.1])]
    confidence_1K, sibling_1KC = torch.full((1, 2), 0.5), torch.tensor([[[3, 4], [5, 6]]])
    proposal = Drafts(torch.tensor([[1, 2]]), confidence_1K, sibling_BKC=sibling_1KC)
    drafts, origins = schedule.choose([[[0.5, 0.5]]], [proposal], CPU)
    assert drafts.token_BK.tolist() == [[1, 3, 2, 5]]
    assert drafts.parent_BK.tolist() == [[0, 0, 1, 1]]
    assert [origin.place for origin in origins[0]] == [1, 1, 2, 2]
    dear = resting(0.2)
    dear.mask_acceptance.sibling_counts = [Rates([0.38]), Rates([0.1])]
    assert dear.choose([[[0.5, 0.5]]], [proposal], CPU)[0].parent_BK is None  # a chain costs nothing more


def test_drafts_of_ngrams_raise_what_masks_must_beat():
    """A token is worth less where passes bring two without masks: then masks that bring few more do not pay."""
    schedules = [adaptive(1.4, 0.01), adaptive(1.4, 0.01)]
    for schedule, tokens in zip(schedules, (5, 15), strict=True):
        schedule.tokens, schedule.trial, schedule.resting = tokens, 0, 99
        choice(schedule, [[]])
    assert [bool(schedule.masks) for schedule in schedules] == [True, False]


# ---------------------------------------------------------------- fixed


@pytest.mark.parametrize("linear", [True, False])
def test_fixed_schedules_take_all_drafts_of_masks(linear):
    schedule = FixedSchedule(3, linear)
    plan = schedule.plan_masks(drafts_of([[0.1, 0.1, 0.1], [0.9]]), 3)
    assert plan.drafts_BR.tolist() == ([[0, 0, 0, 3], [0, 3, 0, 0]] if linear else [[3, 3, 3, 3], [3, 3, 0, 0]])
    expected = [[[0.1] * 3, [0.1]], [[0.9] * 5, []]]
    assert schedule.counts(expected) == [[3, 1], [0, 0]]
    proposal = drafts_of(expected[0])
    drafts, origins = schedule.choose(expected, [proposal, None], CPU)
    assert drafts is proposal
    assert [[tuple(origin) for origin in row] for row in origins] == [[(0, 1), (0, 2), (0, 3)], [(0, 1)]]
    assert schedule.choose(expected, [None, None], CPU)[0].count == 0
    assert schedule.fixed_drafts(3) == 3


# ---------------------------------------------------------------- acceptance


def test_acceptance_forgets():
    acceptance = MaskAcceptance(2)
    acceptance.count([(2, 2)] * 400)
    assert acceptance.rates[0] > 0.95
    acceptance.count([(2, 0)] * 400)
    assert acceptance.rates[0] < 0.05


def test_a_draft_counts_if_those_before_it_were_accepted():
    rates = Rates([0.6] * 3)
    for _ in range(2000):
        rates.count(offered=3, accepted=1)
    assert rates.rate(0) > 0.95
    assert rates.rate(1) < 0.05
    assert rates.rate(2) == rates.rate(9) == 0.6


def test_drafts_are_chosen_by_their_own_confidence():
    proposals = [Drafts(torch.tensor([[1, 2, 3]]), torch.tensor([row])) for row in ([0.9, 0.9, 0.9], [0.9, 0.2, 0.9])]
    # By their places alone, all three would be worth a column.
    chosen = [resting(0.25).choose([[[0.8, 0.8, 0.8]]], [proposal], CPU)[0].count for proposal in proposals]
    assert chosen == [3, 1]


def test_proposals_count_whether_or_not_they_were_verified():
    acceptance = MaskAcceptance(2)
    for _ in range(300):
        acceptance.compare([1, 2], [0.8, 0.4], [[3, 4], [5, 6]], [3, 9])
        acceptance.compare([1, 2], [0.8, 0.4], [[3, 4], [5, 6]], [1, 6, 7])
    assert acceptance.rates == pytest.approx([0.5, 0], abs=0.02)
    # Confidence is corrected by what came true, and the last wrong draft's second sibling was right half of the time.
    assert acceptance.rates_of([0.8, 0.85, 0.4, 0.99]) == pytest.approx([0.5, 0.53, 0, 0.99], abs=0.03)
    assert acceptance.sibling_rates_of([0.8, 0.0])[1] == pytest.approx([0.5, 0.5], abs=0.02)
    assert acceptance.sibling_rates_of([0.8])[0] == pytest.approx([0.1, 0.1], abs=0.02)
    acceptance.forget(8)
    assert acceptance.counts.offered == pytest.approx([8, 8])


def columns_by_enumeration(reach: list[float], survival: list[float], costs: PassCosts, worth: float) -> float:
    """The best surplus of a chain with masks, over all numbers of drafts and sets of masks that have no gaps."""
    best = -math.inf
    for drafts in range(len(reach) + 1):
        landing = [a - b for a, b in itertools.pairwise([1.0, *reach[:drafts], 0.0])]
        for blocks in itertools.product(range(len(survival) + 1), repeat=drafts + 1):
            slope = costs.slopes(masks=True)[0]
            gain = sum(
                land * sum(worth * value - slope for value in survival[:masks])
                for land, masks in zip(landing, blocks, strict=True)
            )
            if sum(blocks):
                cost = costs.of(1 + drafts + sum(blocks), masks=True)
                best = max(best, gain + worth * sum(reach[:drafts]) - cost)
    return best


@pytest.mark.parametrize("column", [0.001, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("rate", [0.2, 0.6, 0.9])
def test_columns_are_the_best_of_all(rate, column):
    tree = CandidateTree()
    tree.add_chain(0, [7, 8, 9], [rate] * 3)
    survival, curve = [rate, rate**2], costs(1.2, column)
    row = tree.best(9)
    found = masked_columns([row], survival, curve, worth=0.8)
    assert found.surplus == pytest.approx(columns_by_enumeration(row.reach, survival, curve, 0.8), abs=0.02)


def test_two_drafters_with_one_token():
    tree = CandidateTree()
    tree.add_chain(0, [7, 8], [0.5, 0.5])
    tree.add_chain(1, [7, 9], [0.6, 0.9])
    assert (tree.tokens, tree.parents) == ([7, 8, 9], [0, 1, 1])
    assert tree.rates == pytest.approx([0.8, 0.5, 0.9])
    row = tree.best(9)
    assert row.tokens == [7, 9, 8]
    assert row.reach == pytest.approx([0.8, 0.8 * 0.9 / 1.4, 0.8 * 0.5 / 1.4])  # two alternatives cannot both be right
    assert row.landing(3) == pytest.approx([0.2, 0.0, *row.reach[1:]])
    assert row.landing(1) == pytest.approx([0.2, 0.8])
    assert row.rates(3) == pytest.approx([0.8, 0.9 / 1.4, 0.5 / 1.4])


# ---------------------------------------------------------------- store


def test_calls_work_on_copies_of_what_was_learned():
    store = ScheduleStore()
    first = store.borrow("a", lambda: adaptive())
    first.masks = 3
    store.give_back("a", first)
    second, third = (store.borrow("a", lambda: adaptive()) for _ in range(2))
    assert second.masks == third.masks == 3
    assert len({id(first), id(second), id(third)}) == 3
    second.masks = 1
    assert store.borrow("a", lambda: adaptive()).masks == 3
    assert store.borrow("b", lambda: adaptive()).masks == 4


def test_threads_may_learn_at_the_same_time():
    store, errors = ScheduleStore(), []

    def call():
        try:
            for _ in range(40):
                schedule = store.borrow("a", lambda: adaptive())
                Decoding(schedule, [0.5] * 4).run(3)
                store.give_back("a", schedule)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
