"""Which masks a pass computes: whole blocks, or the most valuable ones of a budget."""

import itertools

import pytest
import torch

from hf_mtp.layout.mask_plan import choose_masks, landing_probability, mask_values, no_masks, whole_blocks


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
def test_a_budget_goes_to_the_most_valuable_masks_in_order(budget):
    generator = torch.Generator().manual_seed(budget)
    landing, survival = torch.rand(3, 4, generator=generator), torch.tensor([0.8, 0.5, 0.3])
    plan = choose_masks(mask_values(landing, survival), budget)
    assert plan.masks == budget
    for row in range(3):
        worth = {(a, s): landing[row, a].item() * survival[s - 1].item() for a in range(4) for s in (1, 2, 3)}
        expected = sorted(sorted(worth, key=worth.get, reverse=True)[:budget])
        chosen = list(zip(plan.anchor_BM[row].tolist(), plan.step_BM[row].tolist(), strict=True))
        assert chosen == expected
        for column, (anchor, step) in enumerate(chosen):
            assert plan.column_BRk[row, anchor, step - 1] == column
        assert plan.drafts_BR[row].tolist() == [sum(a == anchor for a, _ in chosen) for anchor in range(4)]


def test_blocks_have_no_gaps_among_equals():
    plan = choose_masks(torch.ones(1, 3, 4), 7)
    for anchor in range(3):
        steps = plan.step_BM[0, plan.anchor_BM[0] == anchor].tolist()
        assert steps == list(range(1, len(steps) + 1))


def test_masks_of_no_value_are_dead():
    value = torch.zeros(2, 2, 2)
    value[0, 1] = torch.tensor([1.0, 0.5])
    plan = choose_masks(value, 3)
    assert plan.alive_BM.sum(dim=1).tolist() == [2, 0]
    assert (plan.column_BRk[1] == -1).all()
    assert plan.drafts_BR.tolist() == [[0, 2], [0, 0]]


@pytest.mark.parametrize("linear", [True, False])
def test_whole_blocks(linear):
    plan = whole_blocks(torch.tensor([3, 1]), count=3, k=2, linear=linear)
    counts = plan.drafts_BR.tolist()
    assert counts == ([[0, 0, 0, 2], [0, 2, 0, 0]] if linear else [[2, 2, 2, 2], [2, 2, 0, 0]])
    assert plan.masks == (2 if linear else 8)
    assert not plan.is_chain


@pytest.mark.parametrize(
    ("drafts", "linear", "is_chain"),
    [([3], True, True), ([3, 3], True, False), ([3], False, False), ([0], False, True), ([0, 0], False, True)],
)
def test_a_chain_is_one_block_on_the_last_token_of_every_row(drafts, linear, is_chain):
    assert whole_blocks(torch.tensor(drafts), max(drafts), 2, linear).is_chain == is_chain


@pytest.mark.parametrize("k", [0, 3])
def test_no_masks(k):
    for plan in (no_masks(2, 4, k, torch.device("cpu")), choose_masks(torch.ones(2, 4, k), 0)):
        assert plan.masks == 0
        assert plan.drafts_BR.tolist() == [[0] * 4] * 2
        assert plan.column_BRk.shape == (2, 4, k)
