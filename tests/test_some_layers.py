"""A LoRA on some layers only, as `layers_to_transform` asks: nothing assumes that every layer has one."""

import pytest
import torch
from oracle import RIGHT, Oracle
from peft import PeftModel
from tiny_models import VOCAB, generate, prompt, tiny_base, upgraded

K = 3
STRATEGIES = ("quadratic", "linear", "auto")
# What the adapter of SmolLM2-135M has, in small: four kinds of layers, and none of them at the bottom.
UPPER = {"target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj"], "layers_to_transform": [1, 2]}
LOWER = {"target_modules": ["v_proj", "down_proj"], "layers_to_transform": [0]}
OF_GPT2 = {"target_modules": ["c_attn"], "layers_to_transform": [2]}
OF_BLOOM = {"target_modules": ["dense_h_to_4h"], "layers_to_transform": [1, 2]}
CASES = {"llama": UPPER, "gemma3_text": UPPER, "gpt2": OF_GPT2, "bloom": OF_BLOOM}


def base_of(architecture: str = "llama", dtype: torch.dtype = torch.float64):
    layers = "n_layer" if architecture in ("gpt2", "bloom") else "num_hidden_layers"
    kinds = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    return tiny_base(architecture, dtype, **{layers: 3}, **(kinds if architecture == "gemma3_text" else {}))


def gated(model) -> set[str]:
    return {".".join(name.split(".")[2:]) for name in model.base_model.gated_layers()}


def masks_of(model) -> torch.Tensor:
    """The logits at masks after a text."""
    with torch.no_grad():
        return model(torch.cat([prompt(), torch.arange(VOCAB, VOCAB + K)[None]], dim=1)).logits[:, -K:]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("architecture", CASES)
def test_decoding_is_exact(architecture, strategy, monkeypatch):
    if architecture == "bloom" and strategy == "quadratic":
        pytest.skip("reads plain sequences only")
    model = upgraded(base_of(architecture), K, dtype=torch.float64, **CASES[architecture])
    expected = generate(model, prompt())
    assert torch.equal(generate(model, prompt(), mtp=True, mtp_strategy=strategy), expected)
    Oracle(monkeypatch, expected, RIGHT["sometimes"])
    assert torch.equal(generate(model, prompt(), mtp=True, mtp_strategy=strategy), expected)
    assert strategy == "auto" or 0 < model.mtp_statistics.accepted < model.mtp_statistics.drafted


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_decoding_in_bfloat16_is_bitwise(strategy, monkeypatch):
    model = upgraded(base_of(dtype=torch.bfloat16), K, **UPPER)
    expected = generate(model, prompt())
    Oracle(monkeypatch, expected, RIGHT["sometimes"])
    output = generate(model, prompt(), mtp=True, mtp_strategy=strategy, mtp_bitwise=True)
    assert torch.equal(output, expected)


def test_the_file_has_these_layers_and_comes_back_the_same(tmp_path):
    model = upgraded(base_of(), K, dtype=torch.float64, **UPPER)
    parts = {f"self_attn.{name}" for name in ("q_proj", "o_proj")} | {
        f"mlp.{name}" for name in ("gate_proj", "up_proj")
    }
    assert gated(model) == {f"{layer}.{part}" for layer in (1, 2) for part in parts}
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(base_of(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert gated(loaded) == gated(model)
        torch.testing.assert_close(masks_of(loaded), masks_of(model))


def test_adapters_with_other_layers_beside_each_other(tmp_path):
    """What one adapter computes does not depend on the layers of another, in whatever order they came."""
    alone = {}
    for name, config in (("upper", UPPER), ("lower", LOWER)):
        model = upgraded(base_of(), K, dtype=torch.float64, **config)
        alone[name] = masks_of(model)
        model.save_pretrained(tmp_path / name)
    for first, second in (("upper", "lower"), ("lower", "upper")):
        model = PeftModel.from_pretrained(base_of(), tmp_path / first, adapter_name=first).eval()
        expected = generate(model, prompt())
        model.load_adapter(tmp_path / second, second)
        for name in (second, first):
            model.set_adapter(name)
            torch.testing.assert_close(masks_of(model), alone[name])
            for strategy in STRATEGIES:
                assert torch.equal(generate(model, prompt(), mtp=True, mtp_strategy=strategy), expected)
        model.delete_adapter(first)  # the active one
        assert model.active_adapters == [second]
        torch.testing.assert_close(masks_of(model), alone[second])
