"""Noise by seed, row and position: standard Gumbel noise, the same whenever and in whatever order it is asked for."""

import pytest
import torch

from hf_mtp.decoding.noise import PositionNoise, draw_seed
from hf_mtp.decoding.verification import chosen_tokens

CPU = torch.device("cpu")


def noise(seed: int = 0, row: int = 0, vocab_size: int = 7) -> PositionNoise:
    return PositionNoise(seed, row, vocab_size, CPU)


def p_value(seen: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the chi-square test."""
    statistic = ((seen - expected) ** 2 / expected).sum().double()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2).double(), statistic / 2))


def test_it_is_standard_gumbel_noise():
    values = torch.cat([noise(vocab_size=5000).at(position) for position in range(20)]).double()
    uniform = (-(-values).exp()).exp()  # by the distribution function
    seen = torch.histc(uniform, bins=100, min=0, max=1)
    assert p_value(seen, torch.full((100,), 1000.0)) > 1e-3


def test_its_tails_are_not_those_of_float32():
    """A uniform number in float32 is a multiple of 2^-24, so that its largest noise would be one of few values."""
    values = noise(vocab_size=2**22).at(0)
    assert values.dtype == torch.float32
    assert values.isfinite().all()
    steps = (-values.topk(200).values.double()).exp() * 2**24
    assert 0.15 < (steps - steps.round()).abs().mean() < 0.35
    assert 2**22 * 1e-4 * 0.8 < (values > -torch.tensor(1e-4).log()).sum() < 2**22 * 1e-4 * 1.2
    assert 2**22 * 1e-4 * 0.8 < (values < -(-torch.tensor(1e-4).log()).log()).sum() < 2**22 * 1e-4 * 1.2


def test_it_depends_on_seed_row_and_position_alone():
    forwards, backwards = noise(), noise()
    ahead = [forwards.at(position) for position in range(5)]
    assert all(torch.equal(backwards.at(position), ahead[position]) for position in reversed(range(5)))
    others = [noise(1).at(0), noise(0, 1).at(0), noise(1, 1).at(0), noise(2**63 - 2).at(0), *ahead]
    assert len({tuple(values.tolist()) for values in others}) == len(others)


def test_what_was_forgotten_comes_again_the_same():
    row = noise()
    before = row.at(3).clone()
    row.at(4)
    row.forget_before(4)
    assert row._drawn.keys() == {4}
    assert torch.equal(row.at(3), before)


def test_it_leaves_the_random_state_of_the_process_alone():
    state = torch.get_rng_state()
    noise().at(0)
    draw_seed(torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_come_from_the_generator_or_from_torchs_global_one():
    first, again = (torch.Generator().manual_seed(3) for _ in range(2))
    seeds = [draw_seed(first), draw_seed(first)]
    assert seeds == [draw_seed(again), draw_seed(again)]
    assert seeds[0] != seeds[1]
    torch.manual_seed(3)
    assert draw_seed(None) == seeds[0]


@pytest.mark.parametrize("by", ["positions", "rows", "seeds"])
def test_the_token_that_maximises_score_plus_noise_is_a_draw(by):
    """20,000 of them, over positions of one row, rows of one call, or calls."""
    logits, places = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0]), range(20_000)
    if by == "positions":
        row = noise(vocab_size=5)
        drawn = torch.stack([row.at(place) for place in places])
    else:
        drawn = torch.stack([noise(**{by[:-1]: place}, vocab_size=5).at(0) for place in places])
    seen = torch.bincount(chosen_tokens(logits, drawn), minlength=5)
    assert p_value(seen, 20_000 * logits.softmax(dim=0)) > 1e-3
