"""What users of PEFT do with several adapters: a mistake says what is wrong, and loses nothing."""

import shutil

import pytest
import torch
from datasets import load_dataset
from peft import (
    ArrowConfig,
    AutoPeftModelForCausalLM,
    EvaConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from safetensors.torch import load_file
from test_prompts import image_model
from tiny_models import VOCAB, generate, prompt, randomised, tiny_base, upgraded
from tiny_text import tiny_tokenizer
from tiny_training import texts, trainer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from trl import SFTConfig, SFTTrainer

import hf_mtp
from hf_mtp import GatedLoraConfig
from hf_mtp.adapter.card import write_model_card
from hf_mtp.adapter.gate import GatedVariant
from hf_mtp.export.vllm import export_vllm

WEIGHTS = "adapter_model.safetensors"


def with_masks(rows: int = 1) -> torch.LongTensor:
    return torch.cat([prompt(rows=rows), torch.arange(VOCAB, VOCAB + 2).expand(rows, -1)], dim=1)


# ---------------------------------------------------------------- another adapter above an upgraded model


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize(
    "config", [LoraConfig(target_modules=["q_proj"]), IA3Config(target_modules=["q_proj"], feedforward_modules=[])]
)
def test_an_adapter_above_an_upgraded_model_is_refused_and_changes_nothing(config, name, tmp_path):
    model = upgraded("llama")
    expected, names = model(input_ids=with_masks()).logits, list(model.state_dict())
    with pytest.raises(ValueError, match=f"A {type(config).__name__} cannot add .* Add the adapter to the base first"):
        get_peft_model(model, config, adapter_name=name)
    assert list(model.peft_config) == ["default"] and model.active_peft_config.k == 3
    assert list(model.state_dict()) == names
    assert torch.equal(model(input_ids=with_masks()).logits, expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(generate(model, prompt(), mtp=True), generate(tiny_base("llama"), prompt()))


def test_a_lora_on_disk_above_an_upgraded_model_is_refused_and_changes_nothing(tmp_path):
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_base("llama"), lora).save_pretrained(tmp_path)
    model = upgraded("llama")
    with pytest.raises(ValueError, match="A LoraConfig cannot add"):
        PeftModel.from_pretrained(model, tmp_path)
    assert model.active_peft_config.k == 3


# ---------------------------------------------------------------- an adapter of the user's on the same base


def on_other_layers(config) -> tuple[PeftModel, PeftModel]:
    """An upgraded model, and the user's own adapter of the same name on other layers of its base."""
    model = upgraded("llama", target_modules=["v_proj"])
    with pytest.warns(UserWarning, match="second time"):
        return model, get_peft_model(model.get_base_model(), config)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        OFTConfig(target_modules=["q_proj"], oft_block_size=8, task_type="CAUSAL_LM"),
    ],
)
def test_weights_of_the_users_adapter_on_other_layers_are_not_saved_as_ours(config, tmp_path):
    alone, (model, _) = upgraded("llama", target_modules=["v_proj"]), on_other_layers(config)
    for name, saved in (("alone", alone), ("beside", model)):
        saved.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / WEIGHTS) for name in ("alone", "beside")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    PeftModel.from_pretrained(tiny_base("llama"), tmp_path / "beside")


def test_switching_ours_leaves_the_users_adapter_on_other_layers():
    model = upgraded("llama", target_modules=["v_proj"])
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    users = randomised(get_peft_model(model.get_base_model(), lora, adapter_name="users"))
    expected = generate(users, prompt())
    assert not torch.equal(expected, generate(tiny_base("llama"), prompt()))
    model.add_adapter("second", GatedLoraConfig(k=2, r=2, target_modules=["v_proj"]))
    for name in ("second", "default"):
        model.set_adapter(name)
        assert torch.equal(generate(model, prompt(), mtp=True), expected)
    with model.disable_adapter():
        assert torch.equal(generate(model, prompt()), expected)
    model.delete_adapter("default")
    assert torch.equal(generate(model, prompt(), mtp=True), expected)


def test_unloading_ours_leaves_the_users_adapter_on_other_layers():
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model, users = on_other_layers(lora)
    expected = generate(users, prompt())
    base = model.unload()
    assert torch.equal(generate(users, prompt()), expected) and "default" in base.peft_config
    assert not any("v_proj.lora" in name for name, _ in base.named_parameters())


@pytest.mark.parametrize("unload", ["unload", "merge_and_unload"])
def test_unloading_the_users_adapter_on_other_layers_leaves_ours(unload, tmp_path):
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model, users = on_other_layers(lora)
    expected = generate(users if unload == "merge_and_unload" else tiny_base("llama"), prompt())
    getattr(users, unload)()
    assert torch.equal(generate(model, prompt(), mtp=True), expected)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_base("llama"), tmp_path)


def test_a_second_gated_adapter_does_not_switch_off_the_users_on_its_layers(tmp_path):
    upgraded("llama").save_pretrained(tmp_path)
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model, users = on_other_layers(lora)
    expected = generate(users, prompt())
    assert not torch.equal(expected, generate(tiny_base("llama"), prompt()))
    with pytest.raises(ValueError, match=r"q_proj` has a LoRA of your own.*Upgrade the base, .*, once more"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]
    again = PeftModel.from_pretrained(model.get_base_model(), tmp_path)
    for each in (model, again):
        assert torch.equal(generate(each, prompt(), mtp=True), expected)
    assert torch.equal(generate(users, prompt()), expected)


def test_a_refused_adapter_does_not_take_the_users_of_the_same_name_with_it(tmp_path):
    upgraded("llama").save_pretrained(tmp_path)
    model = get_peft_model(tiny_base("llama"), GatedLoraConfig(k=3, r=4, target_modules=["v_proj"]), "mtp")
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    users = get_peft_model(model.get_base_model(), lora)
    expected = generate(users, prompt())
    with pytest.raises(ValueError, match="has a LoRA of your own"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(generate(users, prompt()), expected)
    assert not torch.equal(expected, generate(tiny_base("llama"), prompt()))


def test_the_users_adapter_of_the_same_name_on_other_layers_stays_as_it_is():
    model = upgraded("llama", target_modules=["v_proj"], dtype=torch.bfloat16)
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    users = get_peft_model(model.get_base_model(), lora, "users", autocast_adapter_dtype=False)
    weights = {name: p.requires_grad_(False) for name, p in users.named_parameters() if ".users." in name}
    expected = generate(users, prompt())
    model.add_adapter("users", GatedLoraConfig(k=2, r=2, target_modules=["v_proj"]))
    model.set_requires_grad("users")
    model.delete_adapter("users")
    assert torch.equal(generate(users, prompt()), expected)
    left = {name: p for name, p in users.named_parameters() if ".users." in name}
    assert left.keys() == weights.keys() and len(left) == 4
    assert {p.dtype for p in left.values()} == {torch.bfloat16} and not any(p.requires_grad for p in left.values())


@pytest.mark.parametrize("config", [IA3Config, OFTConfig])
def test_an_adapter_around_gated_layers_does_not_change_their_names_in_the_file(config, tmp_path):
    model, names = upgraded("llama", target_modules=["v_proj"]), ("alone", "around")
    model.save_pretrained(tmp_path / "alone")
    options = {"feedforward_modules": []} if config is IA3Config else {"oft_block_size": 8}
    users = get_peft_model(model.get_base_model(), config(target_modules=["v_proj"], **options))
    model.save_pretrained(tmp_path / "around")
    files = [load_file(tmp_path / name / WEIGHTS) for name in names]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    model.load_adapter(tmp_path / "alone", "again")
    PeftModel.from_pretrained(tiny_base("llama"), tmp_path / "around")
    assert torch.equal(generate(model, prompt(), mtp=True), generate(users, prompt()))


@pytest.mark.parametrize("place", ["on other layers", "beneath"])
def test_the_users_adapter_of_the_same_name_is_not_trained_along(place, tmp_path):
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    if place == "beneath":
        users = get_peft_model(tiny_base("llama"), lora)
        model = get_peft_model(users, GatedLoraConfig(k=3, r=2))
        users.set_adapter("default")  # PEFT lets gradients into it
    else:
        model, users = on_other_layers(lora)
    with pytest.raises(ValueError, match=r"4 other parameters are trainable, such as 'model.model.layers.0.*q_proj"):
        trainer(tmp_path, model=model)
    for name, parameter in users.get_base_model().named_parameters():
        if "q_proj" in name:
            parameter.requires_grad_(False)
    trainer(tmp_path, model=model, max_steps=1).train()


def test_saving_above_the_users_adapter_says_that_it_is_not_saved(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(hf_mtp.adapter.hub.logger, "warning_once", said.append)
    users = get_peft_model(tiny_base("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    get_peft_model(users, GatedLoraConfig(k=3, r=2), adapter_name="mtp").save_pretrained(tmp_path)
    assert len(said) == 1 and "has an adapter of its own, which is not saved" in said[0]
    twice = upgraded("llama")
    get_peft_model(twice, GatedLoraConfig(k=3, r=2)).save_pretrained(tmp_path)
    twice.save_pretrained(tmp_path)
    assert len(said) == 1


# ---------------------------------------------------------------- loading


@pytest.fixture
def broken(tmp_path):
    """A folder with the config of one adapter and the weights of another; and that other adapter."""
    for name, k in (("broken", 2), ("good", 4)):
        upgraded("llama", k=k).save_pretrained(tmp_path / name)
    shutil.copy(tmp_path / "good" / WEIGHTS, tmp_path / "broken" / WEIGHTS)
    return tmp_path / "broken", tmp_path / "good"


def test_an_adapter_whose_weights_are_refused_is_not_left_in_the_model(broken):
    model = upgraded("llama")
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="wrong shape"):
        model.load_adapter(broken[0], "second")
    assert list(model.peft_config) == ["default"] and list(model.state_dict()) == names
    model.load_adapter(broken[1], "second")  # the name is free
    assert model.peft_config["second"].k == 4
    expected = model.state_dict()
    with pytest.raises(ValueError, match="wrong shape"):
        model.load_adapter(broken[0], "default")  # which was there before
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("error:Found missing adapter keys")
def test_loading_above_the_users_adapter_of_the_same_name_lacks_nothing(broken):
    users = get_peft_model(tiny_base("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert PeftModel.from_pretrained(users, broken[1]).active_peft_config.k == 4


@pytest.mark.parametrize("subfolder", [None, "inside"])
def test_a_folder_without_weights_is_said_to_be_incomplete(subfolder, tmp_path):
    folder = tmp_path / "adapter" / (subfolder or "")
    upgraded("llama").save_pretrained(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"has an adapter_config.json but no {WEIGHTS}: the copy or download"):
        PeftModel.from_pretrained(tiny_base("llama"), tmp_path / "adapter", subfolder=subfolder)
    model = upgraded("llama")
    with pytest.raises(ValueError, match="Download it again, or copy the file"):
        model.load_adapter(tmp_path / "adapter", "second", subfolder=subfolder)
    assert list(model.peft_config) == ["default"]
    assert GatedLoraConfig.from_pretrained(tmp_path / "adapter", subfolder=subfolder).k == 3


# ---------------------------------------------------------------- an adapter beside a model


def test_an_adapter_is_not_saved_beside_a_model(tmp_path):
    tiny_base("llama").save_pretrained(tmp_path)
    model = upgraded(AutoModelForCausalLM.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=r"holds a model \(config.json\). .* Choose another place"):
        model.save_pretrained(tmp_path)
    assert not {"adapter_config.json", "README.md", WEIGHTS} & {path.name for path in tmp_path.iterdir()}
    AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").active_peft_config.k == 3


def test_a_changed_k_is_not_saved(tmp_path):
    model = upgraded("llama", k=3)
    model.active_peft_config.k = 2
    with pytest.raises(ValueError, match="`k` was changed to 2, but the adapter has 3 masks"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.active_peft_config.k = 3
    model.save_pretrained(tmp_path / "out")


def test_a_conversion_of_initial_weights_is_refused_before_anything_is_written(tmp_path):
    model = upgraded("llama")
    model.save_pretrained(tmp_path / "start")
    before = (tmp_path / "start" / "adapter_config.json").read_bytes()
    with pytest.raises(ValueError, match="`path_initial_model_for_weight_conversion` would write a file that cannot"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "start" / "adapter_config.json").read_bytes() == before


@pytest.mark.parametrize("name", ["gemma3", "llava", "mllama"])
def test_an_adapter_of_a_base_that_reads_images_loads_as_its_card_says(name, tmp_path):
    base, inputs = image_model(name)
    base.save_pretrained(tmp_path / "base")
    model = upgraded(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    write_model_card(model.active_peft_config, tmp_path / "adapter")  # as `hf-mtp evaluate --card` does
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert ("pipeline_tag: image-text-to-text" in card) is (name != "gemma3")
    example = card.split("```python")[1].split("tokenizer =")[0].replace('"adapter"', repr(str(tmp_path / "adapter")))
    exec(example, names := {})
    assert type(names["model"].get_base_model()) is type(base)
    torch.testing.assert_close(names["model"](**inputs).logits, model(**inputs).logits)
    export_vllm(str(tmp_path / "adapter"), tmp_path / "exported")


@pytest.mark.parametrize("folder", ["words", None])
def test_a_dataset_of_files_has_no_name(folder, tmp_path):
    file = tmp_path / "words" / "train.jsonl"
    file.parent.mkdir()
    texts().to_json(file)
    named = {"path": str(file.parent)} if folder else {"path": "json", "data_files": str(file)}
    dataset = load_dataset(**named, split="train", cache_dir=str(tmp_path / "cache"))
    assert trainer(tmp_path / "out", dataset).model.active_peft_config.train_datasets == ([folder] if folder else [])


# ---------------------------------------------------------------- other options of PEFT


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_eva_redistributes_ranks_behind_the_gate(use_dora, tmp_path):
    targets = ["q_proj", "v_proj"]
    config = GatedLoraConfig(
        k=2, r=4, target_modules=targets, use_dora=use_dora, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)
    )
    model = get_peft_model(tiny_base("llama"), config)
    batches = [{"input_ids": prompt(rows=4, seed=seed)} for seed in range(4)]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    layers = model.base_model.gated_layers().values()
    assert len({layer.r["default"] for layer in layers}) > 1
    assert all(isinstance(layer.lora_variant["default"], GatedVariant) for layer in layers)
    assert all((layer.lora_variant["default"].inner is not None) is use_dora for layer in layers)
    randomised(model).eval()
    base = tiny_base("llama")
    assert torch.equal(model(input_ids=prompt()).logits, base(input_ids=prompt()).logits)
    assert torch.equal(generate(model, prompt(), mtp=True), generate(base, prompt()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base("llama"), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(loaded(input_ids=with_masks()).logits, model(input_ids=with_masks()).logits)


def test_eva_on_a_model_without_weights_is_refused():
    config = GatedLoraConfig(k=2, r=4, init_lora_weights="eva", eva_config=EvaConfig())
    base = tiny_base("llama")
    with pytest.raises(ValueError, match="Leave out `low_cpu_mem_usage`"):
        get_peft_model(base, config, low_cpu_mem_usage=True)
    assert not base.get_input_embeddings()._forward_hooks


@pytest.fixture
def warnings(monkeypatch):
    """What is said once about forward passes, each time."""
    said = []
    monkeypatch.setattr(hf_mtp.model.logger, "warning_once", said.append)
    return said


def test_a_training_without_masks_warns_that_it_trains_nothing(warnings, tmp_path):
    model = upgraded("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    args = SFTConfig(output_dir=str(tmp_path), save_strategy="no", learning_rate=1.0, **options)
    SFTTrainer(model, args=args, train_dataset=texts(), processing_class=tiny_tokenizer()).train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert warnings and "learns nothing. Train it with `hf_mtp.MTPTrainer`" in warnings[0]


def test_other_forward_passes_warn_of_nothing(warnings, tmp_path):
    made = trainer(tmp_path, max_steps=1)
    made.train()
    made.model(input_ids=with_masks())
    with torch.no_grad():
        made.model(input_ids=prompt())
    made.model.eval()(input_ids=prompt())
    users = get_peft_model(tiny_base("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model = get_peft_model(users, GatedLoraConfig(k=2, r=2), adapter_name="mtp").train()
    for name, parameter in model.get_base_model().named_parameters():
        parameter.requires_grad_("lora_" in name)
    model(input_ids=prompt())
    assert not warnings


def test_arrow_is_refused_by_name():
    with pytest.raises(ValueError, match="`arrow_config` chooses one of several adapters for each token"):
        GatedLoraConfig(arrow_config=ArrowConfig())


def test_an_adapter_for_each_row_is_refused_where_there_are_masks():
    model = upgraded("llama", k=3)
    model.add_adapter("second", GatedLoraConfig(k=2, r=2))
    options = {"adapter_names": ["default", "second", "default"]}
    expected = generate(tiny_base("llama"), prompt(rows=3))
    assert torch.equal(generate(model, prompt(rows=3), **options), expected)
    with pytest.raises(ValueError, match="chooses an adapter for each row, but all masks"):
        generate(model, prompt(rows=3), mtp=True, **options)
    with pytest.raises(ValueError, match="chooses an adapter for each row, but all masks"):
        model(input_ids=with_masks(rows=3), **options)
    model.generation_config.mtp = True
    with pytest.raises(ValueError, match="chooses an adapter for each row, but all masks"):
        generate(model, prompt(rows=3), **options)
    assert torch.equal(generate(model, prompt(rows=3), mtp=False, **options), expected)


def test_a_config_is_for_one_base():
    config = GatedLoraConfig(k=2, r=2)
    get_peft_model(tiny_base("llama"), config)
    with pytest.raises(ValueError, match="has 64. .* A new adapter needs a GatedLoraConfig of its own"):
        get_peft_model(tiny_base("llama", hidden_size=64), config)
