"""What is saved loads again, old adapters included. What could not is refused before it is used or written."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from saved_adapter import DRAFTS, FOLDER, base, drafts
from tiny_models import generate, prompt, randomised, tiny_base, upgraded
from tiny_text import tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_mtp import GatedLoraConfig
from hf_mtp.adapter.base_identity import tokenizer_fingerprint

K = 3
WEIGHTS = "adapter_model.safetensors"


def test_an_adapter_of_an_earlier_version_drafts_as_then():
    model = PeftModel.from_pretrained(base(), FOLDER)
    expected = load_file(FOLDER / DRAFTS)
    found = drafts(model)
    assert found.keys() == expected.keys()
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits)


def test_an_adapter_of_an_earlier_version_above_another():
    users = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    found = drafts(PeftModel.from_pretrained(users, FOLDER))  # a new LoRA has no effect yet
    torch.testing.assert_close(found["masks"], load_file(FOLDER / DRAFTS)["masks"])


# ---------------------------------------------------------------- never half of an adapter


@pytest.fixture
def folders(tmp_path):
    """A base and an adapter in folders."""
    tiny_base("llama").save_pretrained(tmp_path / "base")
    upgraded(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), K).save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


@pytest.mark.parametrize(
    "inject",
    [
        lambda base, adapter: AutoModelForCausalLM.from_pretrained(adapter),
        lambda base, adapter: base.load_adapter(str(adapter)),
        lambda base, adapter: inject_adapter_in_model(GatedLoraConfig(k=2, r=2), base),
    ],
    ids=["auto class", "load_adapter", "inject_adapter_in_model"],
)
def test_half_an_adapter_is_refused(inject, folders):
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"needs a PeftModel .* AutoPeftModelForCausalLM.from_pretrained\(adapter\)"):
        inject(model, folders[1])
    assert [name for name, _ in model.named_modules()] == names
    assert not model.get_input_embeddings()._forward_hooks


# ---------------------------------------------------------------- configs that were changed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("layer_replication", [[0, 2], [0, 2]]),
        ("trainable_token_indices", [1]),
        ("init_lora_weights", "pissa"),
        ("k", 0),
        ("save_dtype", "int8"),
    ],
)
def test_fields_are_checked_when_they_are_used_and_saved(field, value, tmp_path):
    config = GatedLoraConfig(k=2, r=4)
    setattr(config, field, value)
    fresh, changed = tiny_base("llama"), tiny_base("llama")
    with pytest.raises(ValueError, match=f"`{field}"):
        get_peft_model(changed, config)
    assert torch.equal(changed(prompt()).logits, fresh(prompt()).logits)
    model = upgraded("llama", K)
    with pytest.raises(ValueError, match=f"`{field}"):
        model.add_adapter("second", config)
    assert set(model.peft_config) == {"default"}
    setattr(model.peft_config["default"], field, value)
    with pytest.raises(ValueError, match=f"`{field}"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"], r".*(q_proj|lm_head)"])
def test_layers_that_could_only_fail_later_are_refused(targets):
    fresh, changed = tiny_base("llama"), tiny_base("llama")
    with pytest.raises(ValueError, match="includes lm_head.*Leave these layers out"):
        get_peft_model(changed, GatedLoraConfig(k=2, r=4, target_modules=targets))
    assert [name for name, _ in changed.named_modules()] == [name for name, _ in fresh.named_modules()]


def test_without_targets_the_layers_are_pefts_choice():
    ours, plain = (
        get_peft_model(tiny_base("llama"), config(r=2, target_modules=None, task_type="CAUSAL_LM")).base_model
        for config in (GatedLoraConfig, LoraConfig)
    )
    assert ours.targeted_module_names == plain.targeted_module_names


def test_a_failed_upgrade_leaves_the_base_as_it_was():
    base = tiny_base("llama")
    names = [name for name, _ in base.named_modules()]
    for targets in (["q_proj", "embed_tokens"], ["no_such_layer"]):
        with pytest.raises(ValueError, match=r"cannot be gated|not found"):
            get_peft_model(base, GatedLoraConfig(k=2, r=4, target_modules=targets))
        assert [name for name, _ in base.named_modules()] == names
        assert not base.get_input_embeddings()._forward_hooks
        assert not hasattr(base, "peft_config")
    assert torch.equal(generate(upgraded(base, K), prompt(), mtp=True), generate(tiny_base("llama"), prompt()))


def test_a_failed_second_adapter_leaves_the_first():
    model = upgraded("llama", K)
    names, hooks = list(model.state_dict()), len(model.base_model.model.get_input_embeddings()._forward_hooks)
    with pytest.raises(ValueError, match="cannot be gated"):
        model.add_adapter("second", GatedLoraConfig(k=2, r=4, target_modules=["q_proj", "embed_tokens"]))
    assert list(model.state_dict()) == names
    assert len(model.base_model.model.get_input_embeddings()._forward_hooks) == hooks
    assert torch.equal(generate(model, prompt(), mtp=True), generate(tiny_base("llama"), prompt()))


# ---------------------------------------------------------------- nothing that would be refused


@pytest.mark.parametrize(
    ("value", "dtype", "advice"),
    [(torch.nan, None, "earlier checkpoint"), (1e6, "float16", "`save_dtype='float16'` is too narrow")],
)
def test_weights_that_are_not_finite_are_not_saved(value, dtype, advice, tmp_path):
    model = upgraded("llama", K, save_dtype=dtype)
    with torch.no_grad():
        model.base_model.lora_mask_embeddings["default"].weight[1, 2] = value
    with pytest.raises(ValueError, match=rf"not finite in 1 tensor\(s\), such as .*lora_mask_embeddings.*{advice}"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / WEIGHTS).exists()


def test_saving_and_loading_warn_of_nothing(folders, recwarn):
    model = AutoPeftModelForCausalLM.from_pretrained(folders[1])
    model.save_pretrained(folders[1])
    get_peft_model(AutoModelForCausalLM.from_pretrained(folders[0]), GatedLoraConfig(k=2, r=4))
    ours = [str(w.message) for w in recwarn if not issubclass(w.category, FutureWarning)]  # of PEFT's own calls
    assert ours == []


def test_a_fingerprint_counts_known_tokens_only():
    plain, grown = tiny_tokenizer(), tiny_tokenizer()
    grown.add_tokens(["another"])
    size = max(plain.get_vocab().values()) + 1
    assert tokenizer_fingerprint(plain) != tokenizer_fingerprint(grown)
    assert tokenizer_fingerprint(plain, size) == tokenizer_fingerprint(grown, size)
    assert tokenizer_fingerprint(plain, size) != tokenizer_fingerprint(tiny_tokenizer(size - 1), size)


# ---------------------------------------------------------------- names of adapters


@pytest.mark.parametrize("name", ["0", "1", "layers", "mlp", "weight", "bias", "blocks", "lora_A", "a.b", ""])
def test_names_that_files_would_mix_up_are_refused(name):
    with pytest.raises(ValueError, match=f"The adapter cannot have the name {name!r}: .* Choose another"):
        get_peft_model(tiny_base("llama"), GatedLoraConfig(k=K, r=2), adapter_name=name)
    model = upgraded("llama", K)
    with pytest.raises(ValueError, match="The adapter cannot have the name"):
        model.add_adapter(name, GatedLoraConfig(k=K, r=2))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(generate(model, prompt(), mtp=True), generate(model, prompt()))


@pytest.mark.parametrize("name", ["other", "step 100", "é", "10"])
def test_other_names_are_saved_beside_each_other(name, tmp_path):
    model = upgraded("llama", K)
    model.add_adapter(name, GatedLoraConfig(k=K, r=2))
    randomised(model, seed=5).save_pretrained(tmp_path)
    for folder, adapter in ((tmp_path, "default"), (tmp_path / name, name)):
        loaded = PeftModel.from_pretrained(tiny_base("llama"), folder)
        ours = {
            key.replace(f".{adapter}.", ".default."): p for key, p in model.named_parameters() if f".{adapter}." in key
        }
        theirs = {key: p for key, p in loaded.named_parameters() if ".default." in key}
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
