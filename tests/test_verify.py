"""`verify` passes for exact decoding, and finds what planted errors change; ties, and the two-sample test."""

import json

import pytest
import torch
from tiny_models import decoding_plainly, tiny_base, upgraded
from tiny_text import tiny_tokenizer, words
from transformers import RepetitionPenaltyLogitsProcessor

from hf_mtp.cli.verify import _as_text
from hf_mtp.decoding import verification
from hf_mtp.evaluation import verify
from hf_mtp.evaluation.exactness.divergence import Divergence, divergence_at, unit_of_rounding
from hf_mtp.evaluation.exactness.two_sample import p_value
from hf_mtp.evaluation.exactness.verify import Comparison, VerifyReport
from hf_mtp.evaluation.suites.suite import suite_of_rows

PROMPTS = suite_of_rows("words", [{"prompt": words(9, start=index)} for index in range(3)])
LEFT_ALONE = verification.chosen_tokens


@pytest.fixture(scope="module")
def model():
    return upgraded("llama", 3, dtype=torch.float64).double()


def run(model, **options):
    return verify(model, tiny_tokenizer(), PROMPTS, **{"max_new_tokens": 12, "limit": None, **options})


@pytest.mark.parametrize("batch_size", [1, 2])
def test_exact_decoding_is_equal(batch_size, model):
    report = run(model, batch_size=batch_size)
    assert report.is_equal and report.to_dict()["equal"] and report.p_value > 0.001
    assert [(one.mode, one.method, one.answers) for one in report.comparisons] == [
        (mode, f"{method}, k=3", 3) for mode in ("greedy", "sampling") for method in ("auto", "quadratic", "linear")
    ]
    json.dumps(report.to_dict())


SETTINGS = [
    {"temperature": 0.3, "top_k": 3, "top_p": 0.5, "repetition_penalty": 1.3},
    *({name: value} for name, value in (("min_p", 0.9), ("typical_p", 0.2), ("top_h", 0.3))),
    {"epsilon_cutoff": 0.02, "eta_cutoff": 0.1},
    {"return_dict_in_generate": True, "output_scores": True},
    {"num_return_sequences": 2, "num_beams": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_exact_decoding_is_equal_whatever_the_generation_config_says(model, settings, monkeypatch):
    for name, value in {"do_sample": True, **settings}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    report = run(model, strategies=["linear"], limit=1)
    assert report.is_equal and [one.answers for one in report.comparisons] == [1, 1]


def test_a_wrong_greedy_token_is_found_where_it_is(model, monkeypatch):
    def wrong(score_xV, noise_xV):
        token_x = LEFT_ALONE(score_xV, noise_xV)
        return torch.where(token_x == target, score_xV.argmin(dim=-1), token_x)

    plain = model.generate(input_ids=torch.tensor([tiny_tokenizer()(words(9))["input_ids"]]), max_new_tokens=12)
    target = plain[0, 9 + 5].item()
    place = plain[0, 9:].tolist().index(target)
    monkeypatch.setattr(verification, "chosen_tokens", wrong)
    report = run(model, sampling=False, strategies=["quadratic"])
    (comparison,) = report.comparisons
    first = comparison.divergences[0]
    assert not report.is_equal and report.p_value is None
    assert (first.prompt, first.position, first.plain_token) == ("1", place, target)
    assert not first.is_tie and first.units > 1e6 and first.gap > 0.1


def test_sampling_without_its_noise_is_found_by_both_checks(model, monkeypatch):
    monkeypatch.setattr(verification, "chosen_tokens", lambda score_xV, noise_xV: score_xV.argmax(dim=-1))
    report = run(model, strategies=["quadratic"])
    greedy, sampled = report.comparisons
    assert greedy.divergences == [] and len(sampled.divergences) == 3
    assert report.p_value < 0.001 and not report.is_equal


def test_noise_of_another_temperature_is_found_by_the_two_sample_test(model, monkeypatch):
    monkeypatch.setattr(
        verification,
        "chosen_tokens",
        lambda score_xV, noise_xV: LEFT_ALONE(score_xV, None if noise_xV is None else 0.25 * noise_xV),
    )
    assert run(model, strategies=["quadratic"]).p_value < 0.001


def test_a_way_that_the_model_refuses_is_named():
    report = run(upgraded("bloom", 3), sampling=False)
    refused = {one.method: one.refused for one in report.comparisons if one.refused}
    assert list(refused) == ["quadratic, k=3"] and "would not be exact" in refused["quadratic, k=3"]
    assert report.is_equal


def test_nothing_that_was_compared_is_not_equal():
    with pytest.raises(ValueError, match="Nothing could be compared: .*quadratic decoding of Bloom.* not be exact"):
        run(upgraded("bloom", 3), sampling=False, strategies=["quadratic"])


def test_what_decodes_plainly_is_not_compared():
    model = decoding_plainly()
    report = run(model, strategies=["auto", "linear"])
    refused = {(one.method, one.refused is not None, one.answers) for one in report.comparisons}
    assert refused == {("auto, k=3", True, 0), ("linear, k=3", False, 3)} and report.is_equal
    with pytest.raises(ValueError, match="Nothing could be compared.* decodes plainly here"):
        run(model, strategies=["auto"])


def test_an_answer_that_ends_early_differs_where_it_ends():
    found = divergence_at(tiny_base("llama"), "p", [5, 6], [7, 8, 9], [7, 8], 2)
    assert found == Divergence("p", 2, 9, None) and not found.is_tie


def test_a_tie_is_a_gap_within_a_few_units_of_rounding():
    base = tiny_base("llama", dtype=torch.bfloat16, tie_word_embeddings=False)
    with torch.no_grad():
        base.lm_head.weight[20] = base.lm_head.weight[10]
    found = divergence_at(base, "p", [5, 6, 7], [8, 10], [8, 20], 1)
    assert (found.gap, found.units, found.is_tie) == (0.0, 0.0, True)
    logit_V = base(torch.tensor([[5, 6, 7, 8]])).logits[0, -1].float()
    best, worst = logit_V.argmax().item(), logit_V.argmin().item()
    found = divergence_at(base, "p", [5, 6, 7], [8, best], [8, worst], 1)
    assert found.gap == (logit_V[best] - logit_V[worst]).item() and not found.is_tie
    noise_V = torch.zeros(97)
    noise_V[worst] = found.gap
    assert divergence_at(base, "p", [5, 6, 7], [8, best], [8, worst], 1, noise_V).is_tie


def test_a_gap_is_that_of_the_scores_that_choose():
    """Many models penalise repetitions: without that, a tie of scores would look like a wrong token."""
    base, ids = tiny_base("llama"), [5, 6, 7]
    logit_V = base(torch.tensor([ids])).logits[0, -1]
    base.generation_config.repetition_penalty = 2.0
    score_V = RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([ids]), logit_V[None].clone())[0]
    found = divergence_at(base, "p", ids, [6], [20], 0)
    assert found.gap == pytest.approx(abs(score_V[6] - score_V[20]).item())
    assert found.gap != pytest.approx(abs(logit_V[6] - logit_V[20]).item())
    base.generation_config.suppress_tokens = [20]
    assert divergence_at(base, "p", ids, [6], [20], 0) == Divergence("p", 0, 6, 20)


def test_ties_are_no_excuse_for_another_distribution():
    tie = Divergence("p", 0, 5, 6, gap=0.0, units=0.0)
    greedy = [Comparison("auto, k=3", "greedy", 1, [tie])]
    verdicts = [
        _as_text(VerifyReport("bfloat16", 1, 1, greedy, p, {}, {}), tiny_tokenizer()).splitlines()[-1].strip()
        for p in (None, 0.5, 0.0001)
    ]
    assert verdicts == ["DIFFERENT, at ties only: rounding alone decides between these tokens"] * 2 + ["DIFFERENT"]


def test_the_unit_of_rounding_is_that_of_the_largest_logit():
    assert unit_of_rounding(torch.tensor([0.1, -12.0, 3.0], dtype=torch.bfloat16)) == 2**-4
    assert unit_of_rounding(torch.tensor([1.5])) == 2**-23


def test_two_samples_of_one_distribution_differ_as_often_as_the_p_value_says():
    generator = torch.Generator().manual_seed(0)
    values = [p_value(*torch.randint(6, (2, 30, 3), generator=generator), seed=trial) for trial in range(40)]
    assert min(values) > 0.001 and 10 <= sum(value < 0.5 for value in values) <= 30


def test_two_samples_of_different_distributions_differ():
    one, other = torch.randint(6, (2, 60, 3), generator=torch.Generator().manual_seed(0))
    assert p_value(one, other + (torch.arange(3) == 1) * 3) < 0.001
    ended = other.clone()
    ended[:, 2] = -1
    assert p_value(other, ended) < 0.001
