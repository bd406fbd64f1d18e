"""Drafts from the text itself: found where the text reads like its end, taken where they promise more, never wrong."""

import pytest
import torch
from test_batch import SMALL, alone, padded
from tiny_models import generate, prompt, tiny_base, upgraded

from hf_mtp.decoding import generate as generation
from hf_mtp.decoding.drafters.acceptance import Rates
from hf_mtp.decoding.drafters.masks import Drafts, found_drafts
from hf_mtp.decoding.drafters.ngrams import LONGEST_MATCH, Lookup, Match
from hf_mtp.decoding.schedule.adaptive import Pacer, Pass
from hf_mtp.decoding.schedule.lookups import LookupPolicy


@pytest.mark.parametrize(
    ("text", "length", "tokens"),
    [
        ("", 0, ""),
        ("a", 0, ""),
        ("abc", 0, ""),
        ("aba", 1, "bab"),  # where the text runs out, the loop goes on
        ("abxabyab", 2, "yab"),  # the latest place of those that agree equally well
        ("cabxdaby cab", 3, "xda"),  # a better match goes before a later one
        ("aaaa", 3, "aaa"),
        ("abcdefghijk abcdefghij", LONGEST_MATCH, "k a"),
    ],
)
def test_match(text, length, tokens):
    match = Lookup(list(map(ord, text))).match(3)
    assert (match.length, match.tokens) == (length, list(map(ord, tokens)))


def test_growing_text_is_as_if_whole():
    text = (prompt(60) % 3)[0].tolist()
    grown = Lookup([])
    for end, token in enumerate(text):
        assert grown.match(4) == Lookup(text[:end]).match(4)
        grown.extend([token])


def test_rates_go_by_the_length_of_the_match():
    rates = Rates(3)
    for _ in range(300):
        rates.count(offered=2, accepted=1, first=1)
    assert rates.rate(0) == Rates.PRIOR_RATE
    assert rates.rate(1) > 0.95
    assert rates.rate(2) == rates.rate(7) < 0.05


class EveryMatch(Pacer):
    """Takes whatever is found, in every second row."""

    def lookups_to_take(self, found, from_masks):
        return [len(match.tokens) if row % 2 == 0 else 0 for row, match in enumerate(found)]


@pytest.fixture
def every_match(monkeypatch):
    monkeypatch.setattr(generation, "Pacer", EveryMatch)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}], ids=["together", "in_order"])
def test_rows_with_and_without(options, every_match):
    model = upgraded(tiny_base("llama", vocab_size=SMALL), k=3)
    inputs = padded()
    output = model.generate(**inputs, **options, do_sample=False, max_new_tokens=40, mtp=True)
    statistics = model.mtp_statistics
    assert 0 < statistics.looked_up <= statistics.accepted < statistics.drafted
    for row in range(4):
        input_ids = alone(inputs, row)
        expected = generate(model, input_ids, 40, attention_mask=torch.ones_like(input_ids), **options)[0, -40:]
        assert output[row, -40:].tolist() == expected.tolist()


def test_long_runs_are_taken_whole(every_match):
    model = upgraded(tiny_base("llama", vocab_size=SMALL), k=3)
    input_ids = prompt(9) % SMALL
    output = generate(model, input_ids, 100, mtp=True)
    assert torch.equal(output, generate(model, input_ids, 100))
    assert max(model.mtp_statistics.steps) == 1 + LookupPolicy.MOST_DRAFTS


def test_rows_end_within_lookups(every_match):
    model = upgraded(tiny_base("llama", vocab_size=SMALL, seed=3), k=3)
    inputs, arguments = padded((9, 5, 8, 7)), {"eos_token_id": [4], "max_new_tokens": 25, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **arguments, mtp=True), model.generate(**inputs, **arguments))


def test_the_last_position_of_the_model_is_reached(every_match):
    model = upgraded(tiny_base("gpt2", vocab_size=SMALL, n_positions=40), k=3)
    input_ids = prompt(9) % SMALL
    assert torch.equal(generate(model, input_ids, 31, mtp=True), generate(model, input_ids, 31))


@pytest.mark.parametrize("drawn", [False, True])
def test_drafts_of_both_kinds_in_one_batch(drawn):
    none = torch.zeros(3, dtype=torch.bool)
    spread = (torch.full((3, 2, 4), 6), torch.full((3, 2, 4), 0.25)) if drawn else ()
    by_masks = Drafts(torch.full((3, 2), 6), torch.full((3, 2), 0.3), none, *spread)
    found = found_drafts([[1, 2, 3], [], [4]], [[0.9, 0.8, 0.7], [], [0.6]], torch.device("cpu"), drawn)
    both = by_masks.overridden_by(found)
    assert both.token_BK.tolist() == [[1, 2, 3], [6, 6, -1], [4, -1, -1]]
    assert both.looked_up_B.tolist() == [True, False, True]
    torch.testing.assert_close(both.confidence_BK, torch.tensor([[0.9, 0.8, 0.7], [0.3, 0.3, 0], [0.6, 0, 0]]))
    if drawn:
        assert both.candidate_BKC[0, :, 0].tolist() == [1, 2, 3]
        assert both.probability_BKC[0].sum(dim=-1).tolist() == [1, 1, 1]
        assert both.probability_BKC[1].tolist() == [[0.25] * 4, [0.25] * 4, [0] * 4]


def pacer_that_saw(rate: float, dearer: float = 0.3, column: float = 0.01) -> Pacer:
    """After passes of these prices and lookups that were right this often."""
    pacer = Pacer(4)
    pacer.resting = 10_000
    for _ in range(100):
        pacer.observe(Pass(0, 0, 1, 1, [], 1.0))
        for drafts in (3, 6):
            pacer.observe(Pass(drafts, 0, 2, 1, [], 1 + dearer + column * drafts))
    for number in range(100):
        pacer.lookups.compare([Match(1, [7] * 12)], [[7] * 12 if number < 100 * rate else [8]])
    return pacer


def test_lookups_are_taken_where_they_pay():
    found = [Match(1, [7] * 12)]
    assert pacer_that_saw(1.0).lookups_to_take(found, [0]) == [12]
    assert pacer_that_saw(0.0).lookups_to_take(found, [0]) == [0]
    assert pacer_that_saw(0.9, dearer=30.0).lookups_to_take(found, [0]) == [0]
    three_right = pacer_that_saw(1.0)
    for _ in range(400):
        three_right.lookups.compare(found, [[7, 7, 7, 8]])
    assert three_right.lookups_to_take(found, [0]) == [3]


def test_lookups_are_not_taken_where_masks_promise_more():
    pacer = pacer_that_saw(0.3)
    pacer.acceptance.count([(4, 4)] * 300)
    assert pacer.lookups_to_take([Match(1, [7] * 12)], [4]) == [0]
    assert pacer.lookups_to_take([Match(1, [7] * 12)], [0])[0] > 0


def test_nothing_found_takes_nothing():
    assert pacer_that_saw(1.0).lookups_to_take([Match(0, [])] * 2, [0, 3]) == [0, 0]
