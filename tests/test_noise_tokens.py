"""Adapters whose masks are noise tokens of the vocabulary: `GatedLoraConfig(masks="noise")`."""

import copy

import pytest
import torch
from oracle import RIGHT, Oracle, sampled_text
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tiny_models import CACHE, CONFIGS, VOCAB, WITHOUT_BRANCHES, generate, prompt, tiny_base, upgraded
from tiny_training import logged, trainer

from hf_mtp import GatedLoraConfig
from hf_mtp.adapter.noise_tokens import NoiseTokens
from hf_mtp.attached import generate_with_adapter

K = 3
NOISE = {"masks": "noise", "sampler": False}
STRATEGIES = ("quadratic", "linear", "auto")


def mask_logits(model, rows: int = 1) -> torch.Tensor:
    masks = torch.arange(VOCAB, VOCAB + K).expand(rows, -1)
    with torch.no_grad():
        return model(torch.cat([prompt(rows=rows), masks], dim=1)).logits[:, -K:]


def plain_lora(model: PeftModel, architecture: str) -> PeftModel:
    """The weights of a gated adapter in PEFT's own LoRA, which acts on whatever it reads."""
    weights = get_peft_model_state_dict(model)
    layers = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in weights}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=sorted(layers))
    plain = get_peft_model(tiny_base(architecture, torch.float64), config, autocast_adapter_dtype=False)
    missing = plain.load_state_dict(
        {name.replace(".weight", ".default.weight"): w for name, w in weights.items()}, False
    )
    assert not missing.unexpected_keys
    return plain.eval()


# ---------------------------------------------------------------- what masks are


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "qwen3", "granite"])
def test_masks_are_tokens_that_the_base_embeds_and_the_lora_reads(architecture):
    # As in Uno's draft pass: the base has read the text, and base and LoRA together read noise tokens after it.
    model = upgraded(architecture, K, dtype=torch.float64, **NOISE).double()
    noise_1K = model.base_model.noise_tokens["default"].ids[None]
    with torch.no_grad():
        text = tiny_base(architecture, torch.float64)(prompt(), use_cache=True)
        expected = plain_lora(model, architecture)(noise_1K, **{CACHE: getattr(text, CACHE)}).logits
    torch.testing.assert_close(mask_logits(model), expected)
    assert not torch.allclose(expected, tiny_base(architecture, torch.float64)(noise_1K).logits)


def test_tokens_are_fixed_in_evaluation_and_random_in_training():
    tokens, index = NoiseTokens(4, 1000), torch.arange(4).repeat(2, 3)
    tokens.eval()
    assert tokens(index).tolist() == [NoiseTokens(4, 1000).ids.tolist() * 3] * 2
    assert len(set(tokens.ids.tolist())) == 4
    assert tokens.ids.max() < 1000
    tokens.train()
    drawn = torch.stack([tokens(index) for _ in range(100)])
    assert (drawn.min() >= 0) and (drawn.max() < 1000)
    assert len(drawn.unique()) > 800


def test_no_table_is_made_or_saved(tmp_path):
    model = upgraded("llama", K, **NOISE)
    assert all(".lora_A." in name or ".lora_B." in name for name, p in model.named_parameters() if "lora_" in name)
    model.save_pretrained(tmp_path)
    assert "3, noise tokens of the vocabulary" in (tmp_path / "README.md").read_text(encoding="utf-8")
    loaded = PeftModel.from_pretrained(tiny_base("llama"), tmp_path)
    assert loaded.active_peft_config.masks == "noise"
    torch.testing.assert_close(mask_logits(loaded, rows=2), mask_logits(model, rows=2))
    on_meta = PeftModel.from_pretrained(tiny_base("llama"), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(mask_logits(on_meta), mask_logits(model))


def test_unknown_kind_of_masks():
    with pytest.raises(ValueError, match="`masks` must be 'learned'.* or 'noise'.* got 'random'"):
        GatedLoraConfig(masks="random")


def test_both_kinds_side_by_side():
    model = upgraded("llama", K)
    before = mask_logits(model)
    model.add_adapter("noise", GatedLoraConfig(k=K, r=4, **NOISE))
    model.set_adapter("noise")
    assert not torch.allclose(mask_logits(model), before)
    model.delete_adapter("noise")
    model.set_adapter("default")
    assert "noise" not in model.base_model.noise_tokens
    torch.testing.assert_close(mask_logits(model), before)
    twin = copy.deepcopy(upgraded("llama", K, **NOISE))
    torch.testing.assert_close(mask_logits(twin), mask_logits(upgraded("llama", K, **NOISE)))


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("architecture", CONFIGS)
def test_greedy_output_is_plain_decodings(architecture, monkeypatch):
    expected = generate(tiny_base(architecture), prompt())
    model = upgraded(architecture, K, **NOISE)
    strategies = ["linear", "auto"] if architecture in WITHOUT_BRANCHES else STRATEGIES
    for strategy in strategies:
        assert torch.equal(generate(model, prompt(), mtp=True, mtp_strategy=strategy), expected)
    Oracle(monkeypatch, expected, RIGHT["sometimes"])
    for strategy in strategies:
        assert torch.equal(generate(model, prompt(), mtp=True, mtp_strategy=strategy), expected)
        counts = model.mtp_statistics  # `auto` makes no masks where they do not pay
        assert strategy == "auto" or 0 < counts.accepted < counts.drafted


@pytest.mark.parametrize("config", [NOISE, {"masks": "noise"}])
def test_sampled_texts_are_those_of_one_token_at_a_time(config):
    base = tiny_base("llama", torch.float64, vocab_size=8)
    model, ids = upgraded(base, 4, dtype=torch.float64, **config).double(), prompt(9, 3) % 8
    expected = [sampled_text(model.get_base_model(), ids[row : row + 1], 5, row, 24, top_p=0.9) for row in range(3)]
    for strategy in STRATEGIES:
        generator = torch.Generator().manual_seed(5)
        output = model.generate(
            ids, do_sample=True, max_new_tokens=24, top_p=0.9, generator=generator, mtp=True, mtp_strategy=strategy
        )
        assert output[:, 9:].tolist() == expected
    assert 0 < model.mtp_statistics.accepted < model.mtp_statistics.drafted


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_batches_and_caches(options):
    model, ids = upgraded("llama", K, **NOISE), prompt(rows=3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = generate(model, ids, attention_mask=mask, pad_token_id=0, **options)
    output = generate(model, ids, attention_mask=mask, pad_token_id=0, mtp=True, mtp_strategy="quadratic", **options)
    assert torch.equal(output, expected)


def test_embeddings_as_prompts_get_the_same_drafts():
    model = upgraded("gemma3_text", K, **NOISE)
    embedded = model.get_input_embeddings()(prompt())
    model.generate(inputs_embeds=embedded, max_new_tokens=20, do_sample=False, mtp=True, mtp_strategy="linear")
    counts = model.mtp_statistics
    generate(model, prompt(), mtp=True, mtp_strategy="linear")
    assert (counts.steps, counts.drafted) == (model.mtp_statistics.steps, model.mtp_statistics.drafted)


def test_beside_a_base_that_its_owner_goes_on_to_use(tmp_path):
    upgraded("llama", K, **NOISE).save_pretrained(tmp_path)
    base = tiny_base("llama")
    expected = generate(base, prompt())
    output = generate_with_adapter(base, str(tmp_path), input_ids=prompt(), max_new_tokens=20, do_sample=False)
    assert torch.equal(output, expected)
    assert torch.equal(generate(base, prompt()), expected)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"muon": False}])
def test_training_without_a_table_and_a_sampler(options, tmp_path):
    model = upgraded("llama", K, **NOISE)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    trained = trainer(tmp_path, model=model, max_steps=30, **options)
    trained.train()
    losses = logged(trained)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    moved = {
        name for name, p in trained.model.named_parameters() if name in before and not torch.equal(p, before[name])
    }
    assert moved == set(before)
    model.eval()
    assert torch.equal(generate(model, prompt(), mtp=True), generate(model, prompt()))
