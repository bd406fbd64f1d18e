"""Drafts from the text itself: found where the text reads like its end, and never wrong in what comes out."""

import pytest
import torch
from test_batch import SMALL, alone, padded
from tiny_models import generate, prompt, tiny_base, upgraded
from transformers import GenerationConfig, LogitsProcessorList

from hf_mtp.decoding import call
from hf_mtp.decoding.drafters.acceptance import Rates
from hf_mtp.decoding.drafters.base import Drafts, no_drafts
from hf_mtp.decoding.drafters.lookup import MOST_DRAFTS
from hf_mtp.decoding.drafters.ngrams import LONGEST_MATCH, NgramDrafter, NgramIndex
from hf_mtp.decoding.outcome import Outcome, Verified
from hf_mtp.decoding.schedule.adaptive import AdaptiveSchedule, drafts_of
from hf_mtp.decoding.sequence import Sequence


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
    match = NgramIndex(list(map(ord, text))).match(3)
    assert (match.length, match.tokens) == (length, tuple(map(ord, tokens)))


def test_growing_text_is_as_if_whole():
    text = (prompt(60) % 3)[0].tolist()
    grown = NgramIndex([])
    for end, token in enumerate(text):
        assert grown.match(4) == NgramIndex(text[:end]).match(4)
        grown.extend([token])


# ---------------------------------------------------------------- the drafter


def sequence_of(text: str, row: int = 0, padding: int = 0, new_tokens: int = 50) -> Sequence:
    ids = torch.tensor([0] * padding + list(map(ord, text)))
    return Sequence(ids, row, padding, new_tokens, GenerationConfig(), LogitsProcessorList())


def outcome_of(sequences: list[Sequence], new: list[str]) -> Outcome:
    """A pass that added these tokens."""
    tokens = [list(map(ord, text)) for text in new]
    for sequence, row in zip(sequences, tokens, strict=True):
        sequence.append(torch.tensor(row, dtype=torch.long), None, None)
    pending = torch.tensor([sequence.text[-1] for sequence in sequences])
    verified = Verified(tokens, [0] * len(new), [0] * len(new), pending, torch.zeros_like(pending), [False] * len(new))
    return Outcome(sequences, 1, None, None, verified, [[]] * len(new))


def observe(drafter: NgramDrafter, sequences: list[Sequence], new: list[str]) -> tuple[Outcome, list[list[float]]]:
    outcome = outcome_of(sequences, new)
    drafter.observe(outcome)
    return outcome, drafter.expect(outcome)


def test_rows_get_what_they_ask_for():
    drafter = NgramDrafter(Rates([0.6] * 8))
    rows = [sequence_of("abcdab"), sequence_of("xyz", padding=3), sequence_of("ababab")]
    outcome, expected = observe(drafter, rows, ["c", "w", "a"])
    assert [len(row) for row in expected] == [MOST_DRAFTS, 0, MOST_DRAFTS]
    drafts = drafter.propose(outcome, [2, 0, 4])
    assert drafts.token_BK.tolist() == [[*map(ord, "da"), -1, -1], [-1] * 4, list(map(ord, "baba"))]
    assert (drafts.confidence_BK > 0).tolist() == [[True, True, False, False], [False] * 4, [True] * 4]


def test_padding_is_no_text():
    drafter = NgramDrafter(Rates([0.6] * 8))
    _, expected = observe(drafter, [sequence_of("ab", padding=9)], ["c"])
    assert expected == [[]]


def test_finished_rows_and_the_last_token_get_no_drafts():
    drafter = NgramDrafter(Rates([0.6] * 8))
    rows = [sequence_of("aaaa"), sequence_of("aaaa", new_tokens=2), sequence_of("aaaa", new_tokens=3)]
    rows[0].finish()
    _, expected = observe(drafter, rows, ["a", "a", "a"])
    assert [len(row) for row in expected] == [0, 0, 1]


def test_rates_go_by_the_length_of_the_match_taken_or_not():
    drafter, row = NgramDrafter(Rates([0.6] * 8)), sequence_of("abcd", new_tokens=900)
    observe(drafter, [row], ["a"])
    for _ in range(100):  # after one token that agrees, the next draft is right: a loop
        observe(drafter, [row], ["bcda"])
    right = drafter.rates.rate(LONGEST_MATCH - 1)
    assert right > 0.95
    for number in range(60):
        observe(drafter, [row], [chr(300 + number)])
    assert drafter.rates.rate(LONGEST_MATCH - 1) == pytest.approx(right, abs=0.02)  # one wrong, then no match at all


def test_rows_come_and_go():
    drafter, first = NgramDrafter(Rates([0.6] * 8)), sequence_of("abab")
    observe(drafter, [first], ["a"])
    second = sequence_of("xyxy", row=1)
    outcome, expected = observe(drafter, [second, first], ["x", "b"])
    drafts = drafter.propose(outcome, [2, 2])
    assert drafts.token_BK.tolist() == [list(map(ord, "yx")), list(map(ord, "ab"))]
    del outcome, expected, second
    assert len(drafter._indexes) == 1  # nothing is kept of rows that are gone


def test_drafts_of_several_rows():
    found = Drafts(
        torch.tensor([[1, 2, 3], [-1] * 3, [4, -1, -1]]), torch.tensor([[0.9, 0.8, 0.7], [0] * 3, [0.6, 0, 0]])
    )
    assert found.offered_B.tolist() == [3, 0, 1]
    more = no_drafts(1, torch.device("cpu")).with_rows(found)
    assert more.offered_B.tolist() == [0, 3, 0, 1]
    assert more.parent_BK is None
    assert found.where(found.token_BK < 3).token_BK.tolist() == [[1, 2, -1], [-1] * 3, [-1] * 3]
    assert found.select_rows([2, 0]).token_BK.tolist() == [[4, -1, -1], [1, 2, 3]]
    tree = Drafts(torch.tensor([[7, 8]]), torch.tensor([[0.5, 0.2]]), torch.tensor([[0, 0]]))
    assert tree.with_rows(found).parent_BK.tolist() == [[0, 0, 0], *[[0, 1, 2]] * 3]


# ---------------------------------------------------------------- decoding


class EveryMatch(AdaptiveSchedule):
    """Takes whatever is found, in every second row, and drafts of masks in the others."""

    def choose(self, expected, proposals, device):
        masks, found = expected
        masks = [row if index % 2 else [] for index, row in enumerate(masks)]
        found = [row if index % 2 == 0 else [] for index, row in enumerate(found)]
        rows = [self._candidates(row, [masks, found], proposals).best(99) for row in range(len(masks))]
        longest = max(len(row.tokens) for row in rows)
        return drafts_of(rows, longest, longest, device), [row.origins for row in rows]


@pytest.fixture
def every_match(monkeypatch):
    monkeypatch.setattr(call, "AdaptiveSchedule", EveryMatch)


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
    assert max(model.mtp_statistics.steps) == 1 + MOST_DRAFTS


def test_rows_end_within_matches(every_match):
    model = upgraded(tiny_base("llama", vocab_size=SMALL, seed=3), k=3)
    inputs, arguments = padded((9, 5, 8, 7)), {"eos_token_id": [4], "max_new_tokens": 25, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **arguments, mtp=True), model.generate(**inputs, **arguments))


def test_the_last_position_of_the_model_is_reached(every_match):
    model = upgraded(tiny_base("gpt2", vocab_size=SMALL, n_positions=40), k=3)
    input_ids = prompt(9) % SMALL
    assert torch.equal(generate(model, input_ids, 31, mtp=True), generate(model, input_ids, 31))
