"""What the upgraded model promises to PEFT's users: one file, the usual methods, and a base that stays as it was."""

import gc
import weakref

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tiny_models import CONFIGS, VOCAB, adapter_parameters, generate, prompt, randomised, tiny_base, upgraded
from transformers import AutoModelForCausalLM

from hf_mtp import GatedLoraConfig, GatedLoraModel
from hf_mtp.objective.request import ObjectiveRequest

K = 3


@torch.no_grad()
def mask_logits(model, rows: int = 1) -> torch.Tensor:
    """Logits of a prompt that is followed by the masks, in one causal sequence."""
    input_ids = prompt(rows=rows)
    return model(torch.cat([input_ids, torch.arange(VOCAB, VOCAB + K).expand(rows, -1)], dim=1)).logits


@pytest.fixture
def saved(tmp_path):
    """A base and an adapter on disk: (base folder, adapter folder, logits with masks)."""
    base = tiny_base("llama")
    base.save_pretrained(tmp_path / "base")
    model = upgraded(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), K)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", mask_logits(model)


# ---------------------------------------------------------------- one file


def test_one_safetensors_file_has_lora_mask_embeddings_and_sampler(saved):
    _, adapter, _ = saved
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes["base_model.lora_mask_embeddings.weight"] == (K, 32)
    sampler = {name: shape for name, shape in shapes.items() if ".lora_sampler_heads." in name}
    assert sorted(sampler.values()) == [(32,)] * 6 + [(32, 32), (32, 64)]
    projections = {name.split(".")[-3] for name in shapes if "lora_A" in name}
    assert projections == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all("lora_" in name for name in shapes)


def test_round_trip(saved):
    base, adapter, expected = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert isinstance(model.base_model, GatedLoraModel)
    torch.testing.assert_close(mask_logits(model), expected)
    assert model.peft_config["default"].k == K


def test_round_trip_by_auto_class(saved):
    _, adapter, expected = saved
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(mask_logits(model), expected)
    assert torch.equal(generate(model, prompt(), mtp=True), generate(model, prompt()))


def test_round_trip_with_low_memory(saved):
    base, adapter, expected = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    torch.testing.assert_close(mask_logits(model), expected)


def test_loaded_adapter_is_frozen_unless_asked(saved):
    base, adapter, _ = saved
    frozen = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    trainable = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)
    assert {name for name, p in trainable.named_parameters() if p.requires_grad} == set(adapter_parameters(trainable))


@pytest.mark.parametrize("config", [{"sampler": False}, {"sampler_residual": False}, {"use_dora": True}])
def test_round_trip_of_options(config, tmp_path):
    model = upgraded("llama", K, **config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base("llama"), tmp_path)
    torch.testing.assert_close(mask_logits(loaded), mask_logits(model))
    assert (loaded.base_model.sampler_head() is None) == (config == {"sampler": False})


def test_saving_in_half_precision(tmp_path):
    sizes = {}
    for dtype in (None, "bfloat16"):
        model = upgraded("llama", K, save_dtype=dtype)
        model.save_pretrained(tmp_path / str(dtype))
        sizes[dtype] = (tmp_path / str(dtype) / "adapter_model.safetensors").stat().st_size
    assert sizes["bfloat16"] < 0.6 * sizes[None]
    loaded = PeftModel.from_pretrained(tiny_base("llama"), tmp_path / "bfloat16")
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16().float())
    assert torch.equal(generate(loaded, prompt(), mtp=True), generate(model, prompt()))


def test_config_round_trip(tmp_path):
    config = GatedLoraConfig(k=5, r=6, sampler_residual=False, tokens_per_pass={"maths": 2.5}, train_datasets=["a/b"])
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is GatedLoraConfig
    assert loaded.to_dict() == config.to_dict()
    assert loaded.peft_type == "GATED_LORA" != "LORA"


def test_a_config_saved_by_an_earlier_version_keeps_its_measured_numbers(tmp_path):
    GatedLoraConfig(k=5, tokens_per_pass={"maths": 2.5}).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("tokens_per_pass", "tokens_per_step"))
    assert GatedLoraConfig.from_pretrained(tmp_path).tokens_per_pass == {"maths": 2.5}


def test_card_says_how_to_use_the_adapter(saved):
    _, adapter, _ = saved
    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card
    assert "model.generate(**inputs, mtp=True" in card
    assert "| mask tokens (k) | 3 |" in card


def test_card_has_the_tags_of_peft_and_of_the_base_beside_its_own(tmp_path):
    base = tiny_base("llama")
    base.name_or_path = base.config._name_or_path = "me/base"
    base.add_model_tags(["tiny"])
    model = upgraded(base, K)
    for _ in range(2):  # the second time over a card of ours
        model.save_pretrained(tmp_path)
        tags = ModelCard.load(tmp_path / "README.md").data.tags
        assert {"hf_mtp", "lora", "transformers", "base_model:adapter:me/base", "tiny"} <= set(tags)
        assert len(tags) == len(set(tags))


def test_card_names_no_local_folder(saved):
    base, adapter, _ = saved
    assert f"base_model:adapter:{base}" not in (adapter / "README.md").read_text(encoding="utf-8")


def test_card_written_by_hand_is_kept(tmp_path):
    model = upgraded("llama", K)
    (tmp_path / "README.md").write_text("Mine.", encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert "Mine." in (tmp_path / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- PEFT's methods


def test_trainable_parameters_are_the_adapters(capsys):
    model = upgraded("llama", K)
    count = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    assert model.get_nb_trainable_parameters()[0] == count
    model.print_trainable_parameters()
    assert f"trainable params: {count:,}" in capsys.readouterr().out


def test_a_new_adapter_predicts_like_its_masks_alone():
    # LoRA's B and the residual sampler's gain start at zero: nothing of the base is disturbed at first.
    model = get_peft_model(tiny_base("llama"), GatedLoraConfig(k=K, r=4)).eval()
    hidden, previous = torch.randn(2, 32), torch.randn(2, 32)
    assert torch.equal(model.base_model.sampler_head()(previous, hidden), hidden)
    assert all((p == 0).all() for name, p in adapter_parameters(model).items() if "lora_B" in name)


def test_disable_adapter_closes_the_gate_and_reopens_it():
    model = upgraded("llama", K)
    expected = mask_logits(model)
    with model.disable_adapter():
        assert model.base_model.adapters_disabled
        assert not torch.allclose(mask_logits(model)[:, -K:], expected[:, -K:])
        assert torch.equal(model(prompt()).logits, tiny_base("llama")(prompt()).logits)
    assert not model.base_model.adapters_disabled
    assert torch.equal(mask_logits(model), expected)


def two_adapters():
    model = upgraded("llama", K)
    model.add_adapter("wide", GatedLoraConfig(k=5, r=2, sampler=False))
    return randomised(model, seed=3).eval()


def test_two_adapters_on_one_base(tmp_path):
    model, plain = two_adapters(), generate(tiny_base("llama"), prompt())
    logits = {}
    for name, k in (("wide", 5), ("default", K)):
        model.set_adapter(name)
        assert model.base_model.active_mtp_config.k == k
        assert torch.equal(generate(model, prompt(), mtp=True, mtp_strategy="quadratic"), plain)
        assert len(model.mtp_statistics.drafted_per_position) == k
        logits[name] = mask_logits(model)
    assert not torch.allclose(logits["wide"][:, -K:], logits["default"][:, -K:])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "wide", adapter_name="wide")
    for name, expected in logits.items():
        loaded.set_adapter(name)
        torch.testing.assert_close(mask_logits(loaded), expected)


def test_an_adapter_loads_under_another_name(tmp_path):
    model = upgraded("llama", K)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base("llama"), tmp_path, adapter_name="mtp")
    loaded.load_adapter(tmp_path, adapter_name="twice")
    for name in ("mtp", "twice"):
        loaded.set_adapter(name)
        own, other = loaded.base_model.lora_sampler_heads[name], model.base_model.lora_sampler_heads["default"]
        assert all(torch.equal(*pair) for pair in zip(own.parameters(), other.parameters(), strict=True))
        assert torch.equal(mask_logits(loaded), mask_logits(model))


def test_set_adapter_lets_gradients_into_one_adapter_only():
    model = two_adapters()
    for name, other in (("wide", "default"), ("default", "wide")):
        model.set_adapter(name)
        trainable = {parameter for parameter, p in model.named_parameters() if p.requires_grad}
        assert trainable == {p for p in adapter_parameters(model) if f".{name}." in p}
        assert not any(f".{other}." in parameter for parameter in trainable)


def test_delete_adapter():
    model = two_adapters()
    model.set_adapter("default")
    expected = mask_logits(model)
    model.delete_adapter("wide")
    assert not any(".wide." in name for name in adapter_parameters(model))
    assert torch.equal(mask_logits(model), expected)
    model.add_adapter("wide", GatedLoraConfig(k=2, r=2))
    model.set_adapter("wide")
    assert generate(model, prompt(), mtp=True).tolist() == generate(model, prompt()).tolist()


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(),
        lambda model: model.add_weighted_adapter(["default"], [1.0], "merged"),
        lambda model: model.get_base_model().model.layers[0].self_attn.q_proj.merge(),
    ],
)
def test_merging_is_refused_and_changes_nothing(merge):
    model = upgraded("llama", K)
    expected = mask_logits(model)
    with pytest.raises(NotImplementedError, match=r"cannot be merged.*unload\(\)"):
        merge(model)
    assert torch.equal(mask_logits(model), expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_unload_gives_the_base_back(architecture):
    fresh, model = tiny_base(architecture), upgraded(architecture, K)
    base = model.unload()
    assert type(base) is type(fresh)
    assert [name for name, _ in base.named_modules()] == [name for name, _ in fresh.named_modules()]
    assert torch.equal(base(prompt()).logits, fresh(prompt()).logits)
    assert not base.get_input_embeddings()._forward_hooks
    assert not base.get_input_embeddings()._forward_pre_hooks
    with pytest.raises(IndexError):
        mask_logits(base)


def test_a_base_can_be_upgraded_again_after_unload():
    base = upgraded("llama", K).unload()
    model = upgraded(base, 2)
    assert torch.equal(generate(model, prompt(), mtp=True), generate(tiny_base("llama"), prompt()))


def test_model_is_freed_when_dropped():
    model = upgraded("llama", K)
    generate(model, prompt(), 4, mtp=True)
    dropped = weakref.ref(model.get_base_model())
    del model
    gc.collect()
    assert dropped() is None


# ---------------------------------------------------------------- the base stays as it was


@pytest.mark.parametrize("tied", [True, False])
def test_base_is_untouched(tied):
    fresh, base = (tiny_base("llama", tie_word_embeddings=tied) for _ in range(2))
    model = upgraded(base, K)
    generate(model, prompt(), mtp=True)
    assert base.get_input_embeddings().weight.shape == (VOCAB, 32)
    assert base.config.vocab_size == VOCAB
    weights = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(weights[name], tensor)
    assert (base.get_input_embeddings().weight is base.get_output_embeddings().weight) == tied
    assert torch.equal(generate(model, prompt(), mtp=True), generate(fresh, prompt()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_base_in_half_precision(dtype):
    model = upgraded(tiny_base("llama", dtype), K)
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {torch.float32}
    assert torch.equal(model(prompt()).logits, tiny_base("llama", dtype)(prompt()).logits)
    assert mask_logits(model).dtype == dtype
    assert generate(model, prompt(), mtp=True).shape == (1, 31)
    loss = model.train()(input_ids=prompt(), mtp_objective=ObjectiveRequest()).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(model).values())


def dtypes_of(model, adapter: str = "default") -> set[torch.dtype]:
    return {p.dtype for name, p in adapter_parameters(model).items() if f".{adapter}." in name}


def test_adapters_in_the_dtype_of_the_base(tmp_path):
    base = tiny_base("llama", torch.bfloat16)
    model = get_peft_model(base, GatedLoraConfig(k=K, r=4), autocast_adapter_dtype=False).eval()
    model.add_adapter("added", GatedLoraConfig(k=K, r=4, sampler_recurrent=True), autocast_adapter_dtype=False)
    assert dtypes_of(model) == dtypes_of(model, "added") == {torch.bfloat16}
    for adapter in ("default", "added"):
        model.set_adapter(adapter)
        assert generate(model, prompt(), mtp=True).shape == (1, 31)
    model.train()(input_ids=prompt(), mtp_objective=ObjectiveRequest()).loss.backward()
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_loaded_adapters_have_the_dtype_that_was_asked_for(autocast, dtype, low_cpu_mem_usage, tmp_path):
    upgraded("llama", K, save_dtype="bfloat16").save_pretrained(tmp_path)
    options = {"autocast_adapter_dtype": autocast, "low_cpu_mem_usage": low_cpu_mem_usage}
    model = PeftModel.from_pretrained(tiny_base("llama", torch.bfloat16), tmp_path, **options)
    model.load_adapter(tmp_path, "other", **options)
    assert dtypes_of(model) == dtypes_of(model, "other") == {dtype}


def test_target_modules_are_loras_own():
    model = upgraded("llama", K, target_modules=["q_proj", "v_proj"], exclude_modules=r".*layers\.1.*")
    targets = {name.rpartition(".lora_A")[0] for name in adapter_parameters(model) if "lora_A" in name}
    assert {name.partition("layers.")[2] for name in targets} == {"0.self_attn.q_proj", "0.self_attn.v_proj"}
    assert torch.equal(generate(model, prompt(), mtp=True), generate(model, prompt()))


# ---------------------------------------------------------------- masks by id


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "opt"])
def test_mask_ids_in_a_plain_forward_pass(architecture):
    model = upgraded(architecture, K, dtype=torch.float64)
    embeddings = model.base_model.lora_mask_embeddings["default"]
    before = mask_logits(model, rows=2)
    with torch.no_grad():
        embeddings.weight[1] *= -1
    after = mask_logits(model, rows=2)
    first = prompt().shape[1]
    assert before.shape == (2, first + K, VOCAB)
    # A causal sequence: what stands before the changed mask does not change, it and all after it do.
    torch.testing.assert_close(before[:, : first + 1], after[:, : first + 1])
    assert ((before[:, first + 1 :] - after[:, first + 1 :]).abs().amax(dim=-1) > 1e-6).all()


def test_masks_differ_by_id():
    model = upgraded("llama", K)
    logits = [model(torch.cat([prompt(), torch.tensor([[VOCAB + i]])], dim=1)).logits[0, -1] for i in range(K)]
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2])


def test_an_input_of_masks_alone():
    assert upgraded("llama", K)(torch.arange(VOCAB, VOCAB + K)[None]).logits.shape == (1, K, VOCAB)


@pytest.mark.parametrize(
    "input_ids",
    [
        [[5, 6, VOCAB + K]],  # one above the last mask
        [[5, VOCAB, 6]],  # a regular token after a mask
        [[5, 6, VOCAB], [5, VOCAB, VOCAB + 1]],  # a column with masks in one row only
    ],
)
def test_misplaced_or_unknown_ids_are_refused(input_ids):
    with pytest.raises(ValueError, match=f"Ids {VOCAB} to {VOCAB + K - 1} are mask tokens, which must follow all"):
        upgraded("llama", K)(torch.tensor(input_ids))


def test_labels_give_the_bases_own_loss():
    batch = {"input_ids": prompt(rows=2), "labels": prompt(rows=2)}
    assert torch.equal(upgraded("llama", K)(**batch).loss, tiny_base("llama")(**batch).loss)


def test_mask_embeddings_start_like_token_embeddings():
    base = tiny_base("llama")
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(0.01).add_(3)
    masks = get_peft_model(base, GatedLoraConfig(k=8, r=4)).base_model.lora_mask_embeddings["default"].weight
    table = base.get_input_embeddings().weight
    assert (masks.mean() - table.mean()).abs() < table.std()
    assert 0.5 < masks.std() / table.std() < 2


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_saves_and_loads(architecture, tmp_path):
    model = upgraded(architecture, K)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base(architecture), tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor)
