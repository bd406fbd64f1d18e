"""Scripts in `examples/benchmarks` that measure single passes still run: their parts, on a tiny model."""

from importlib import import_module as script
from pathlib import Path

import pytest
import torch
from scripts import importable
from tiny_models import prompt, tiny_base, upgraded

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "benchmarks"
K = 3


@pytest.fixture(autouse=True)
def _importable():
    with importable(FOLDER):
        yield


@pytest.fixture
def not_compiled(monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedModel.get_compiled_call", lambda model, config: model.__call__)


@torch.inference_mode()
def test_plain_decoding_on_a_gpu_measures_the_next_token_of_the_base(not_compiled):
    model, prefix_1T = upgraded(k=K), prompt(9)
    decoding = script("measure_gpu").PlainDecoding(model, prefix_1T, 8, "cpu")
    decoding()
    text_1T = torch.cat([prefix_1T, prefix_1T[:, -1:]], dim=1)
    assert torch.equal(decoding.token, model.get_base_model()(text_1T).logits[:, -1:].argmax(dim=-1))


@torch.inference_mode()
def test_masked_decoding_on_a_gpu_keeps_as_many_drafts_as_it_is_told(not_compiled):
    decoding = script("measure_gpu").MaskedDecoding(upgraded(k=K), prompt(9), K, 2 * K, 16, "cpu")
    assert decoding.cache.rows.lengths == [9]
    decoding(accepted=2)
    assert decoding.cache.rows.lengths == [9 + 1 + 2]
    decoding(accepted=0, keep=False)
    assert decoding.cache.rows.lengths == [9 + 1 + 2]
    assert decoding.drafts.count == K


@torch.inference_mode()
def test_passes_that_measure_the_cost_of_masks_have_as_many_columns_as_asked(monkeypatch):
    measure_pass, read = script("measure_pass"), []
    monkeypatch.setattr(measure_pass, "PREFIX", 11)
    model = upgraded(k=K)
    passes = measure_pass.Passes(model, prompt(11))
    model.get_base_model().model.register_forward_hook(lambda *call: read.append(call[2].last_hidden_state.shape[1]))
    for measured in (passes.bare, passes.masked, passes.without_lora):
        measured(7)
    passes.draft(7)
    assert read == [7, 7, 7]


@torch.no_grad()
def test_both_parts_of_bitwise_decoding_together_give_the_logits_of_single_columns():
    measure_rounding = script("measure_rounding")
    base = tiny_base(hidden_size=128, intermediate_size=320)  # whole vectors of a CPU, so that SiLU rounds alike
    passes = measure_rounding.Passes(upgraded(base, k=K), prefix=12)
    expected_TV = passes.one_by_one()
    assert torch.equal(passes.at_once(4, in_order=True, by_column=True), expected_TV)
    ordinary_TV = passes.at_once(4, in_order=False, by_column=False)
    torch.testing.assert_close(ordinary_TV, expected_TV, atol=1e-3, rtol=1e-3)


def test_rejection_sampling_accepts_a_draft_more_often_than_shared_noise():
    measure_sampling = script("measure_sampling")
    ids_1T, generator = prompt(40), torch.Generator().manual_seed(0)
    for place, base_AV, draft_AV in measure_sampling.logits_of(upgraded(k=K), ids_1T, 8, 12, generator):
        rates = measure_sampling.rates(base_AV, draft_AV, temperature=1.0, seed=place)
        means = {name: rate_A.mean() for name, rate_A in rates.items()}
        assert means["rejection sampling"] >= means["shared noise, 1 candidate(s)"] - 0.05
        assert means["shared noise, 3 candidate(s)"] >= means["shared noise, 1 candidate(s)"]
