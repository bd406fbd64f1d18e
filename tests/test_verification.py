"""Verification, against loops that check one draft at a time."""

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)
from transformers.generation import EosTokenCriteria

from hf_mtp.decoding.batch import Batch
from hf_mtp.decoding.drafters.base import Drafts, no_drafts
from hf_mtp.decoding.noise import PositionNoise
from hf_mtp.decoding.outcome import Origin, Outcome
from hf_mtp.decoding.sequence import Sequence
from hf_mtp.decoding.statistics import MTPStatistics
from hf_mtp.decoding.verification import chosen_tokens, noise_of, verify_in_order, verify_together
from hf_mtp.decoding.verifier import Verifier
from hf_mtp.layout.mask_plan import no_masks
from hf_mtp.passes.decoding_pass import PassOutput

V, CPU = 6, torch.device("cpu")


def rows(count: int, seed: int | None = None, prompt: int = 3, new_tokens: int = 20) -> list[Sequence]:
    return [
        Sequence(
            torch.arange(prompt),
            row,
            0,
            new_tokens,
            GenerationConfig(),
            LogitsProcessorList(),
            None if seed is None else PositionNoise(seed, row, V, CPU),
        )
        for row in range(count)
    ]


def drafts_near(token_BR: torch.LongTensor, generator: torch.Generator, rate: float = 0.3) -> Drafts:
    """The right tokens, of which some are wrong, and some rows have fewer than others, at random."""
    token_BK = token_BR[:, :-1].clone()
    wrong = torch.rand(token_BK.shape, generator=generator) < rate
    token_BK[wrong] = (token_BK[wrong] + 1) % V
    count_B = torch.randint(0, token_BK.shape[1] + 1, (len(token_BK),), generator=generator)
    count_B[torch.rand(len(token_BK), generator=generator) > rate] = token_BK.shape[1]
    return Drafts(token_BK, torch.ones(token_BK.shape)).where(torch.arange(token_BK.shape[1]) < count_B[:, None])


# ---------------------------------------------------------------- all at once


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("processors", [[], [TemperatureLogitsWarper(0.5)]], ids=["none", "temperature"])
def test_all_at_once_is_one_by_one(processors, sampled):
    generator = torch.Generator().manual_seed(0)
    processors = LogitsProcessorList(processors)
    seen = set()
    for _ in range(20):
        logits = torch.randn(4, 5, V, generator=generator)
        noise = noise_of(rows(4, seed=1), 5) if sampled else None
        score = torch.stack([torch.stack([processors(None, one[None].clone())[0] for one in row]) for row in logits])
        right = (score + (noise if sampled else 0)).argmax(-1)
        drafts, given = drafts_near(right, generator), logits.clone()
        token_BR, accepted_B, _, score_BRV = verify_together(logits, drafts, noise, processors)
        assert torch.equal(logits, given)
        torch.testing.assert_close(score_BRV, score)
        for row in range(4):
            accepted = 0
            while accepted < 4 and drafts.token_BK[row, accepted] == right[row, accepted]:
                accepted += 1
            assert accepted_B[row] == accepted
            assert token_BR[row, : accepted + 1].tolist() == right[row, : accepted + 1].tolist()
            seen.add(accepted)
    assert seen == {0, 1, 2, 3, 4}


def test_scores_are_compared_in_float32():
    logits = torch.tensor([[[1.0, 1.0 + 1e-9, 0.0]]], dtype=torch.float64)
    token_BR, _, _, score_BRV = verify_together(logits, no_drafts(1, CPU), None, LogitsProcessorList())
    assert score_BRV.dtype == torch.float32
    assert token_BR.item() == 0  # the first among equals, as in plain decoding


def test_noise_is_that_of_the_next_positions():
    row = rows(1, seed=3)[0]
    row.append(torch.tensor([1, 2]), None, None)
    noise = noise_of([row], 3)
    assert all(torch.equal(noise[0, place], row.noise.at(2 + place)) for place in range(3))
    assert noise_of(rows(2), 3) is None
    assert chosen_tokens(torch.zeros(V), torch.arange(V).float()).item() == V - 1


# ---------------------------------------------------------------- in order


class Keeps(LogitsProcessor):
    """Bans the last token, and keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.tolist(), scores.clone()))
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


class Stops(StoppingCriteria):
    """Stops rows at a token; keeps what it was called with."""

    def __init__(self, token: int = -1):
        self.token, self.calls = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append(input_ids.tolist())
        return input_ids[:, -1] == self.token


def plain(logits_GRV, noise_GRV, processor, criterion, pad_token, steps: int):
    """What plain decoding does with these logits for so many tokens, or until all rows stopped."""
    ids, stopped = torch.arange(3).expand(len(logits_GRV), -1), torch.zeros(len(logits_GRV), dtype=torch.bool)
    for step in range(steps):
        score = processor(ids, logits_GRV[:, step].clone()) + (0 if noise_GRV is None else noise_GRV[:, step])
        token = score.argmax(-1)
        if pad_token is not None:
            token = token.masked_fill(stopped, pad_token)
        ids = torch.cat([ids, token[:, None]], dim=1)
        stopped = stopped | criterion(ids, None)
        if stopped.all():
            break
    return ids


@pytest.mark.parametrize("pad_token", [None, 0])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_group_goes_on_as_in_plain_decoding(count, sampled, pad_token):
    generator, lengths, stops = torch.Generator().manual_seed(1), set(), 0
    for trial in range(30):
        logits = torch.randn(count, 5, V, generator=generator)
        noise = noise_of(rows(count, seed=trial), 5) if sampled else None
        truth = plain(logits, noise, Keeps(), Stops(2), None, 5)
        right = torch.nn.functional.pad(truth[:, 3:], (0, 8 - truth.shape[1]))
        drafts = drafts_near(right, generator, rate=0.3 / count**2)
        group = rows(count, seed=trial if sampled else None)
        processor, criterion = Keeps(), Stops(2)
        verify_in_order(
            group, logits, drafts, LogitsProcessorList([processor]), StoppingCriteriaList([criterion]), pad_token
        )
        new = group[0].new_tokens
        wanted_processor, wanted_criterion = Keeps(), Stops(2)
        expected = plain(logits, noise, wanted_processor, wanted_criterion, pad_token, new)
        assert [row.ids_1S[0].tolist() for row in group] == expected.tolist()
        assert criterion.calls == wanted_criterion.calls
        assert [ids for ids, _ in processor.calls] == [ids for ids, _ in wanted_processor.calls]
        for (_, scores), (_, wanted) in zip(processor.calls, wanted_processor.calls, strict=True):
            assert torch.equal(scores, wanted)
        # It goes on as far as drafts reach: to a wrong one in any row, or to a row that stops.
        new_BT = expected[:, 3:]
        ends = [
            place
            for place in range(new)
            if (new_BT[:, place] == 2).any()
            or place == drafts.count
            or (drafts.token_BK[:, place] != new_BT[:, place]).any()
        ]
        assert new == ends[0] + 1
        lengths.add(new)
        stops += group[0].is_stopped
        finished = [bool((row == 2).any()) for row in new_BT]
        assert [row.is_stopped for row in group] == finished
        assert [row.is_finished for row in group] == (
            finished if pad_token is not None else [all(finished)] * len(finished)
        )
    assert len(lengths) > 2 and stops


def test_a_row_that_stopped_goes_on_with_padding():
    group = rows(2)
    group[0].finish()
    logits = torch.zeros(2, 2, V)
    logits[:, :, 4] = 1.0
    drafts = Drafts(torch.tensor([[0], [4]]), torch.ones(2, 1))
    verify_in_order(group, logits, drafts, LogitsProcessorList(), StoppingCriteriaList([MaxLengthCriteria(9)]), 0)
    assert [row.ids_1S[0, 3:].tolist() for row in group] == [[0, 0], [4, 4]]
    assert [row.is_finished for row in group] == [True, False]


def test_processors_may_write_into_what_they_get():
    class Writes(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:] = 0
            return scores

    logits = torch.randn(1, 1, V)
    given = logits.clone()
    verify_in_order(
        rows(1),
        logits,
        no_drafts(1, CPU),
        LogitsProcessorList([Writes()]),
        StoppingCriteriaList([MaxLengthCriteria(9)]),
        None,
    )
    assert torch.equal(logits, given)


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("in_step", [False, True])
def test_a_looked_up_draft_that_ends_the_text_counts(in_step):
    tokens, end = torch.tensor([2, 3, 4]), 4
    logits = torch.nn.functional.one_hot(torch.tensor([[2, 3, 4, 5]]), V).float()
    # Two alternatives, the second one right, and behind it a chain to the end of the text.
    drafts = Drafts(torch.tensor([[1, 2, 3, 4]]), torch.ones(1, 4), torch.tensor([[0, 0, 2, 3]]))
    logits = logits[:, [0, 0, 1, 2, 3]]  # after the pending token, the wrong draft, and the right ones
    criteria = StoppingCriteriaList([MaxLengthCriteria(99), EosTokenCriteria(end)])
    verifier = Verifier(LogitsProcessorList(), criteria, 1, in_step=in_step)
    batch = Batch(rows(1), None, torch.zeros(1, 5, dtype=torch.long), drafts)
    output = PassOutput(logits, torch.zeros(1, 0, 1), 0, [3])
    verified, origins = verifier(batch, output), [[Origin(1, place) for place in (1, 1, 2, 3)]]
    assert verified.tokens == [tokens.tolist()] and verified.accepted == [3]
    statistics = MTPStatistics()
    statistics.count_pass(Outcome(batch.sequences, 5, no_masks(1, 5, 1, CPU), output, verified, origins))
    assert statistics.accepted == statistics.looked_up == 3
