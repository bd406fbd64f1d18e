"""MaskPlan go to the masks of most value, and none are bought while plain decoding is faster."""

import itertools

import pytest
import torch

from hf_mtp.decoding.drafters.acceptance import MaskAcceptance
from hf_mtp.decoding.drafters.masks import Drafts, no_drafts
from hf_mtp.decoding.schedule.adaptive import Pacer, Pass, Whole
from hf_mtp.layout.mask_plan import choose_masks, landing_probability, mask_values


def test_landing_probability_of_every_outcome():
    accept = torch.tensor([[0.9, 0.5, 0.2], [1.0, 0.0, 0.7]])
    expected = torch.zeros(2, 4)
    for row, outcome in itertools.product(range(2), itertools.product([True, False], repeat=3)):
        probability = 1.0
        for accepted, p in zip(outcome, accept[row].tolist(), strict=True):
            probability *= p if accepted else 1 - p
        expected[row, (*outcome, False).index(False)] += probability
    torch.testing.assert_close(landing_probability(accept), expected)


@pytest.mark.parametrize("budget", [1, 4, 7, 12])
def test_slots_are_the_most_valuable_masks_in_order(budget):
    generator = torch.Generator().manual_seed(budget)
    landing, survival = torch.rand(3, 4, generator=generator), torch.tensor([0.8, 0.5, 0.3])
    slots = choose_masks(mask_values(landing, survival), budget)
    for row in range(3):
        worth = {(a, s): landing[row, a].item() * survival[s - 1].item() for a in range(4) for s in (1, 2, 3)}
        expected = sorted(sorted(worth, key=worth.get, reverse=True)[:budget])
        chosen = list(zip(slots.anchor_BM[row].tolist(), slots.step_BM[row].tolist(), strict=True))
        assert chosen == expected
        for slot, (anchor, step) in enumerate(chosen):
            assert slots.column_BRk[row, anchor, step - 1] == slot
        assert slots.drafts_BR[row].tolist() == [sum(a == anchor for a, _ in chosen) for anchor in range(4)]


def test_blocks_have_no_gaps_among_equals():
    slots = choose_masks(torch.ones(1, 3, 4), 7)
    for anchor in range(3):
        steps = slots.step_BM[0, slots.anchor_BM[0] == anchor].tolist()
        assert steps == list(range(1, len(steps) + 1))


def test_masks_of_no_value_are_dead():
    value = torch.zeros(2, 2, 2)
    value[0, 1] = torch.tensor([1.0, 0.5])
    slots = choose_masks(value, 3)
    assert slots.alive_BM.sum(dim=1).tolist() == [2, 0]
    assert (slots.column_BRk[1] == -1).all()


@pytest.mark.parametrize("linear", [True, False])
def test_whole_blocks(linear):
    drafts = Drafts(torch.tensor([[5, 6, 7], [5, -1, -1]]), torch.ones(2, 3), torch.zeros(2).bool())
    counts = Whole(linear).slots(drafts, 2).drafts_BR.tolist()
    assert counts == ([[0, 0, 0, 2], [0, 2, 0, 0]] if linear else [[2, 2, 2, 2], [2, 2, 0, 0]])


def decode(pacer: Pacer, rates: list[float], plain: float, fixed: float, column: float, passes: int) -> list[int]:
    """Budgets of a decoding on a machine with these prices, whose drafts are accepted at these rates."""
    generator = torch.Generator().manual_seed(0)
    drafts, budgets = 0, []
    for _ in range(passes):
        slots = pacer.slots(
            Drafts(torch.ones(1, drafts).long(), torch.full((1, drafts), 0.7), torch.zeros(1).bool()), pacer.k
        )
        masks = slots.alive_BM.shape[1]
        accepted = 0
        while accepted < drafts and torch.rand((), generator=generator) < rates[accepted]:
            accepted += 1
        seconds = plain if drafts == masks == 0 else fixed + column * (1 + drafts + masks)
        pacer.observe(Pass(drafts, masks, 1 + accepted, 1, [(drafts, accepted)] if drafts else [], seconds))
        budgets.append(masks)
        drafts = int(slots.drafts_BR[0, accepted])
    return budgets


def test_masks_are_bought_where_they_pay():
    budgets = decode(Pacer(4), [0.8] * 4, plain=1.0, fixed=1.0, column=0.01, passes=300)
    assert sum(map(bool, budgets)) > 280


@pytest.mark.parametrize(
    ("rate", "fixed"), [(0.0, 1.0), (0.3, 2.0), (0.8, 6.0), (0.3, 10.0)], ids=["bad_drafts", "bad", "dear", "dearer"]
)
def test_masks_that_do_not_pay_cost_a_small_share_of_the_time(rate, fixed):
    """However dear a pass with masks is; the first trial, of unknown cost, is paid for too."""
    seconds = tokens = 0.0

    class Clocked(Pacer):
        def observe(self, done):
            nonlocal seconds, tokens
            seconds, tokens = seconds + done.seconds, tokens + done.tokens
            super().observe(done)

    budgets = decode(Clocked(4), [rate] * 4, plain=1.0, fixed=fixed, column=0.05, passes=6000)
    assert seconds / tokens < 1 + 2 * Pacer.TRIAL_SHARE
    assert sum(map(bool, budgets[300:])) > 0  # a trial now and then


def test_a_dearer_column_buys_fewer_masks():
    cheap, dear = Pacer(4), Pacer(4)
    decode(cheap, [0.8] * 4, plain=1.0, fixed=1.0, column=0.001, passes=200)
    decode(dear, [0.8] * 4, plain=1.0, fixed=1.0, column=0.1, passes=200)
    assert dear.budget < cheap.budget


def test_acceptance_forgets():
    acceptance = MaskAcceptance(2)
    acceptance.count([(2, 2)] * 400)
    assert acceptance.rates[0] > 0.95
    acceptance.count([(2, 0)] * 400)
    assert acceptance.rates[0] < 0.05


def test_nothing_to_draft_from_gives_a_chain():
    slots = Pacer(3).slots(no_drafts(1, torch.device("cpu")), 3)
    assert slots.alive_BM.shape == (1, 0)  # the first passes are plain ones, for their price
    pacer = Pacer(3)
    pacer.resting = 0
    assert pacer.slots(no_drafts(1, torch.device("cpu")), 3).is_chain
