"""LoRA weights prepared for decoding: the same results as the gate's own way, in fewer operations."""

import gc

import pytest
import torch
from tiny_models import adapter_parameters, generate, prompt, upgraded

from hf_mtp.adapter.prepared import PreparedLora

K, FIRST = 3, 5


def attention_layers(model) -> list:
    """Query, key and value, which read one input, and the output projection."""
    attention = model.get_base_model().model.layers[0].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]


def run(model, layer, x: torch.Tensor, lora: PreparedLora | None = None) -> torch.Tensor:
    """What a layer computes for regular columns and, from `FIRST` on, masks."""
    index = torch.arange(K).expand(len(x), -1)
    with model.base_model.masks_in_columns(FIRST, index, lora), torch.no_grad():
        return layer(x)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"k_proj": 2, "v_proj": 5}}], ids=["one rank", "ranks"])
def test_results_are_those_of_the_gate(rows, dtype, options):
    model, lora = upgraded("llama", K, dtype=dtype, **options), PreparedLora()
    for _ in range(2):  # the first pass finds out which layers share an input
        shared, other = torch.randn(2, rows, FIRST + K, 32, dtype=dtype)
        for layer, x in zip(attention_layers(model), (shared, shared, shared, other), strict=True):
            found, expected = run(model, layer, x, lora), run(model, layer, x)
            assert torch.equal(found[:, :FIRST], layer.base_layer(x)[:, :FIRST])
            torch.testing.assert_close(found[:, FIRST:], expected[:, FIRST:])
            assert not torch.allclose(found[:, FIRST:], layer.base_layer(x)[:, FIRST:])


def test_layers_with_one_input_share_a_product():
    model, lora = upgraded("llama", K), PreparedLora()
    x = torch.randn(1, FIRST + K, 32)
    layers = attention_layers(model)
    for layer, read in zip(layers, (x, x, x, x.clone()), strict=True):
        run(model, layer, read, lora)
    shared = [lora._factors[layer, "default"].shared for layer in layers]
    assert shared[0] is shared[1] is shared[2] is not shared[3]
    assert torch.equal(shared[0].A_RD, torch.cat([layer.lora_A["default"].weight for layer in layers[:3]]))


def test_layers_that_share_an_input_no_longer():
    model, lora = upgraded("llama", K), PreparedLora()
    query, key, *_ = attention_layers(model)
    x, other = torch.randn(2, 1, FIRST + K, 32)
    for layer, read in ((query, x), (key, x), (query, x), (key, other), (key, x), (query, other)):
        torch.testing.assert_close(run(model, layer, read, lora), run(model, layer, read))


def test_not_a_number_stays_in_masks():
    model = upgraded("llama", K)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.fill_(torch.nan)
    layer, x = attention_layers(model)[0], torch.randn(2, FIRST + K, 32)
    found = run(model, layer, x, PreparedLora())
    assert torch.equal(found[:, :FIRST], layer.base_layer(x)[:, :FIRST])
    assert found[:, FIRST:].isnan().all()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
def test_what_is_not_plain_is_left_to_the_gate(options):
    model = upgraded("llama", K, **options).train("lora_dropout" in options)
    layer, x, lora = attention_layers(model)[0], torch.randn(1, FIRST + K, 32), PreparedLora()
    torch.manual_seed(0)
    found = run(model, layer, x, lora)
    torch.manual_seed(0)
    assert torch.equal(found, run(model, layer, x))
    assert not any(lora._factors.values())


def test_input_is_not_kept():
    model, lora = upgraded("llama", K), PreparedLora()
    run(model, attention_layers(model)[0], torch.randn(1, FIRST + K, 32), lora)
    gc.collect()
    assert lora._input() is None


# ---------------------------------------------------------------- whole calls of generate


def counts(model, **options) -> tuple[int, list[int]]:
    """Forward passes and accepted drafts by position: they depend on the drafts, and so on the LoRA."""
    generate(model, prompt(rows=2), 30, mtp=True, mtp_strategy="quadratic", **options)
    statistics = model.base_model.mtp_statistics
    return statistics.forward_passes, statistics.accepted_per_position


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "opt"])
def test_drafts_are_those_of_the_gate(architecture, monkeypatch):
    model, used = upgraded(architecture, K, dtype=torch.float64), []
    add = PreparedLora.add
    monkeypatch.setattr(PreparedLora, "add", lambda *args: used.append(add(*args)) or used[-1])
    found = counts(model)
    assert any(used)
    monkeypatch.setattr(PreparedLora, "add", lambda *args: False)
    assert counts(model) == found


def test_weights_that_changed_between_calls_are_seen():
    model, other = upgraded("llama", K), upgraded("llama", K)
    before = counts(model)
    for each in (model, other):
        for name, parameter in adapter_parameters(each).items():
            if "lora_B" in name:
                parameter.data.mul_(-3)  # which counts no version
    after = counts(model)
    assert after == counts(other)
    assert after != before


def test_autocast_decides_the_dtype():
    model = upgraded("llama", K)
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(model, prompt(), 12)
        assert torch.equal(generate(model, prompt(), 12, mtp=True), expected)


def test_autocast_within_a_forward_pass_is_left_to_the_gate():
    model, lora = upgraded("llama", K), PreparedLora()
    layer, x = attention_layers(model)[0], torch.randn(1, FIRST + K, 32)
    with torch.autocast("cpu", torch.bfloat16):  # as accelerate wraps the forward of a model that it trains
        found, expected = run(model, layer, x, lora), run(model, layer, x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
