"""Schedules: masks where they pay by the given costs, rests where they do not, decided by counts alone."""

import random
import threading
import time

import pytest
import torch

from hf_mtp.decoding.drafters.acceptance import MaskAcceptance, Rates
from hf_mtp.decoding.drafters.base import NO_TOKEN, Drafts, no_drafts
from hf_mtp.decoding.outcome import Outcome, Verified
from hf_mtp.decoding.schedule.adaptive import AdaptiveSchedule
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


class Decoding:
    """Decodes no text: drafts of masks are right by chance, at the given rates, with passes of the given costs."""

    def __init__(self, schedule: AdaptiveSchedule, rates: list[float], seed: int = 0):
        self.schedule, self.rates, self.draw = schedule, rates, random.Random(seed)
        self.drafts, self.budgets, self.tokens, self.cost = 0, [], 0, 0.0

    def run(self, passes: int) -> "Decoding":
        for _ in range(passes):
            self.step()
        return self

    def step(self) -> None:
        schedule, offered = self.schedule, self.drafts
        plan = schedule.plan_masks(drafts_of([schedule.mask_acceptance.rates[:offered]]), schedule.k)
        accepted = 0
        while accepted < offered and self.draw.random() < self.rates[accepted]:
            accepted += 1
        landed = torch.tensor([accepted])
        verified = Verified([[7] * (1 + accepted)], [offered], [accepted], torch.tensor([7]), landed, [False])
        columns = 1 + offered + plan.masks
        self.budgets.append(plan.masks)
        self.tokens += 1 + accepted
        self.cost += schedule.costs.of(columns, plan.masks > 0)
        if offered:
            schedule.mask_acceptance.count([(offered, accepted)])
        outcome = Outcome([None], columns, plan, None, verified, [0])
        schedule.observe(outcome)
        expected = schedule.mask_acceptance.rates[: outcome.next_masks[0]]
        self.drafts = schedule.choose([[expected]])[0][0]


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
    cheap, dear = (Decoding(adaptive(column=column), [0.8] * 4).run(200).schedule for column in (0.001, 0.1))
    assert dear.budget < cheap.budget


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
    schedule.budget = 2
    sure, doubtful = (schedule.plan_masks(drafts_of([[rate] * 3]), 4).anchor_BM.tolist() for rate in (0.99, 0.01))
    assert (sure, doubtful) == ([[3, 3]], [[0, 0]])


def test_no_more_masks_than_places():
    schedule = adaptive()
    assert schedule.plan_masks(no_drafts(2, CPU), 4).masks == 4
    assert schedule.plan_masks(no_drafts(2, CPU), 4).is_chain
    assert schedule.plan_masks(no_drafts(2, CPU), 0).masks == 0
    schedule.resting = 3
    assert schedule.plan_masks(drafts_of([[0.9, 0.9]]), 4).masks == 0


def test_a_fixed_budget_is_all_or_nothing():
    schedule = adaptive(fixed=6.0, k=3, budget=6)
    assert (schedule.fixed_drafts(3), schedule._budgets()) == (3, [6])
    budgets = Decoding(schedule, [0.2] * 3).run(100).budgets
    assert set(budgets) <= {0, 3, 6}  # 3 behind the prompt, where there is one place only
    assert schedule.resting
    assert schedule.fixed_drafts(3) == 0


# ---------------------------------------------------------------- adaptive: drafts


def test_the_drafter_that_promises_most_is_chosen_row_by_row():
    masks = [[0.5, 0.5], [0.9, 0.9], []]
    ngrams = [[0.9, 0.9, 0.9], [0.2], []]
    assert adaptive().choose([masks, ngrams]) == [[0, 2, 0], [3, 0, 0]]


def test_drafts_are_verified_while_they_are_worth_their_column():
    schedule = adaptive(column=0.1)
    assert schedule.choose([[[0.9, 0.9, 0.05, 0.9]]]) == [[2]]
    assert schedule.choose([[[0.01, 0.9]]]) == [[0]]
    schedule.resting = 5  # then a draft must pay for the wider pass by a margin
    assert schedule.choose([[[0.12]]]) == [[0]]
    assert schedule.choose([[[0.14]]]) == [[1]]


def test_rows_share_the_cost_of_a_column():
    schedule = adaptive(column=0.1)
    assert schedule.choose([[[0.15], [0.0]]]) == [[0, 0]]
    assert schedule.choose([[[0.15], [0.15]]]) == [[1, 1]]


def test_drafts_of_ngrams_raise_what_masks_must_beat():
    """Plain passes that bring two tokens each, by n-grams: masks that bring 1.5 rest."""
    schedules = [adaptive(1.2, 0.01), adaptive(1.2, 0.01)]
    for schedule, tokens in zip(schedules, (1, 3), strict=True):
        schedule.maskless.extend([(tokens, 1.1)] * 64)
        schedule.mask_acceptance.count([(1, 1), (1, 0)] * 50)
        schedule.plan()
    assert [bool(schedule.resting) for schedule in schedules] == [False, True]


# ---------------------------------------------------------------- fixed


@pytest.mark.parametrize("linear", [True, False])
def test_fixed_schedules_take_all_drafts_of_masks(linear):
    schedule = FixedSchedule(3, linear)
    plan = schedule.plan_masks(drafts_of([[0.1, 0.1, 0.1], [0.9]]), 3)
    assert plan.drafts_BR.tolist() == ([[0, 0, 0, 3], [0, 3, 0, 0]] if linear else [[3, 3, 3, 3], [3, 3, 0, 0]])
    assert schedule.choose([[[0.1] * 3, [0.1]], [[0.9] * 5, []]]) == [[3, 1], [0, 0]]
    assert schedule.fixed_drafts(3) == 3


# ---------------------------------------------------------------- acceptance


def test_acceptance_forgets():
    acceptance = MaskAcceptance(2)
    acceptance.count([(2, 2)] * 400)
    assert acceptance.rates[0] > 0.95
    acceptance.count([(2, 0)] * 400)
    assert acceptance.rates[0] < 0.05


def test_a_draft_counts_if_those_before_it_were_accepted():
    rates = Rates(3)
    for _ in range(2000):
        rates.count(offered=3, accepted=1)
    assert rates.rate(0) > 0.95
    assert rates.rate(1) < 0.05
    assert rates.rate(2) == rates.rate(9) == Rates.PRIOR_RATE


def test_expectations_by_enumeration():
    """Whole blocks: every landing, and every number of drafts accepted behind it."""
    acceptance = MaskAcceptance(2)
    acceptance.count([(2, 2), (2, 1), (1, 0)] * 20)
    one, two = acceptance.rates
    assert acceptance.survival == pytest.approx([one, one * two])
    assert acceptance.expected_drafts(6) == pytest.approx(one + one * two)
    assert acceptance.expected_columns(6) == pytest.approx(2)
    landings = [1 - one, one * (1 - two), one * two]
    assert acceptance.expected_drafts(1) == pytest.approx(max(landings) * one)


# ---------------------------------------------------------------- store


def test_calls_work_on_copies_of_what_was_learned():
    store = ScheduleStore()
    first = store.borrow("a", lambda: adaptive())
    first.budget = 3
    store.give_back("a", first)
    second, third = (store.borrow("a", lambda: adaptive()) for _ in range(2))
    assert second.budget == third.budget == 3
    assert len({id(first), id(second), id(third)}) == 3
    second.budget = 1
    assert store.borrow("a", lambda: adaptive()).budget == 3
    assert store.borrow("b", lambda: adaptive()).budget == 8


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
