"""MTP on top of a user's own LoRA or DoRA, which stays active for all tokens and can be switched as before."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import VOCAB, adapter_parameters, generate, prompt, randomised, tiny_base, upgraded

from hf_mtp import GatedLoraConfig
from hf_mtp.evaluation.support import Rehearsal
from hf_mtp.objective.request import ObjectiveRequest


def fine_tuned(seed: int = 3, **options) -> PeftModel:
    """A base with an ordinary adapter that changes its output."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=4, **options)
    model = get_peft_model(tiny_base("llama", torch.float64), config)
    return randomised(model, seed).eval()


def with_mtp(model: PeftModel) -> PeftModel:
    upgraded = get_peft_model(model, GatedLoraConfig(k=3, r=4), adapter_name="mtp")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in upgraded.named_parameters():
            if "lora_" in name and ".mtp." in name:
                parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return upgraded.eval()


def assert_exact(model: PeftModel, expected: torch.LongTensor) -> None:
    model.base_model.draft = Rehearsal([expected])
    for strategy in ("quadratic", "linear", "auto"):
        assert torch.equal(generate(model, prompt(), mtp=True, mtp_strategy=strategy), expected)
    assert torch.equal(generate(model, prompt()), expected)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_output_is_that_of_the_fine_tuned_model(options):
    users = fine_tuned(**options)
    expected, base = generate(users, prompt()), generate(tiny_base("llama", torch.float64), prompt())
    assert not torch.equal(expected, base)
    assert_exact(with_mtp(users), expected)


def test_masks_and_regular_tokens_both_go_through_the_users_adapter():
    model = with_mtp(fine_tuned())
    tuner = model.base_model
    users = tuner.model.model.layers[0].self_attn.q_proj
    layer = tuner.gated_layers()["model.layers.0.self_attn.q_proj"]
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    index = torch.arange(3)[None]
    with tuner.masks_in_columns(2, index), torch.no_grad():
        y = users(x)
    scale = layer.scaling["mtp"]
    torch.testing.assert_close(y[:, :2], users(x[:, :2]))
    own = layer.lora_B["mtp"](layer.lora_A["mtp"](x[:, 2:].to(layer.lora_A["mtp"].weight.dtype)))
    torch.testing.assert_close(y[:, 2:], users(x[:, 2:]) + scale * own, atol=1e-5, rtol=1e-5, check_dtype=False)


def test_switching_the_users_adapters_at_run_time():
    users = fine_tuned()
    users.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=2))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in users.named_parameters():
            if ".other." in name:
                parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    expected = {}
    for name in ("default", "other"):
        users.set_adapter(name)
        expected[name] = generate(users, prompt())
    assert not torch.equal(*expected.values())
    model = with_mtp(users)
    for name in ("default", "other", "default"):
        users.set_adapter(name)
        assert_exact(model, expected[name])
    with users.disable_adapter():
        assert_exact(model, generate(tiny_base("llama", torch.float64), prompt()))


def test_switching_ours_leaves_the_users():
    users = fine_tuned()
    expected = generate(users, prompt())
    model = with_mtp(users)
    with model.disable_adapter():
        assert torch.equal(generate(model, prompt()), expected)
    model.add_adapter("second", GatedLoraConfig(k=2, r=4))
    model.set_adapter("second")
    assert_exact(model, expected)
    model.delete_adapter("second")
    model.set_adapter("mtp")
    assert_exact(model, expected)


def test_training_changes_ours_only():
    model = with_mtp(fine_tuned()).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=prompt(), mtp_objective=ObjectiveRequest()).loss.backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in adapter_parameters(model) if ".mtp." in name}


def test_saving_and_loading_ours_alone(tmp_path):
    model = with_mtp(fine_tuned())
    expected = generate(model, prompt(), mtp=True, mtp_strategy="quadratic")
    passes = model.base_model.mtp_statistics.steps
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "default").exists()
    again = PeftModel.from_pretrained(fine_tuned(), tmp_path / "mtp", adapter_name="mtp").eval()
    assert torch.equal(generate(again, prompt(), mtp=True, mtp_strategy="quadratic"), expected)
    assert again.base_model.mtp_statistics.steps == passes


def test_unload_gives_the_fine_tuned_model_back():
    users = fine_tuned()
    expected = generate(users, prompt())
    base = with_mtp(users).unload()
    assert torch.equal(generate(base, prompt()), expected)
    assert torch.equal(generate(users, prompt()), expected)
    assert set(base.peft_config) == {"default"}


# ---------------------------------------------------------------- through the user's own PeftModel


def assert_same_output(model: PeftModel, other: PeftModel) -> None:
    assert torch.equal(model(prompt()).logits, other(prompt()).logits)


def names_of_layers(model: PeftModel) -> list[str]:
    return [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("name", ["mtp", "default"])
def test_the_users_adapter_is_saved_as_before(name, tmp_path):
    users = fine_tuned()
    layers = names_of_layers(users)
    users.save_pretrained(tmp_path / "before")
    get_peft_model(users, GatedLoraConfig(k=3, r=4), adapter_name=name)
    users.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert (tmp_path / "before" / "adapter_config.json").read_text() == (
        tmp_path / "after" / "adapter_config.json"
    ).read_text()
    assert names_of_layers(users) == layers
    assert_same_output(PeftModel.from_pretrained(tiny_base("llama", torch.float64), tmp_path / "after"), users)


def test_loading_adding_and_deleting_the_users_adapters(tmp_path):
    other = fine_tuned(seed=4)
    other.save_pretrained(tmp_path)
    users = fine_tuned()
    first = fine_tuned()
    model = with_mtp(users)
    masks = model.base_model.mask_embeddings(torch.arange(3)[None])
    users.load_adapter(tmp_path, adapter_name="other")
    users.set_adapter("other")
    assert_same_output(users, other)
    assert_exact(model, generate(other, prompt()))
    users.add_adapter("wide", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=8))
    users.set_adapter("wide")  # starts without effect, and one of its layers had no adapter before
    assert_exact(model, generate(tiny_base("llama", torch.float64), prompt()))
    users.delete_adapter("other")
    users.set_adapter("default")
    assert_exact(model, generate(first, prompt()))
    assert set(users.peft_config) == {"default", "wide"}
    assert set(model.peft_config) == {"mtp"}
    assert torch.equal(model.base_model.mask_embeddings(torch.arange(3)[None]), masks)


def mask_logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.cat([prompt(), torch.arange(VOCAB, VOCAB + 3)[None]], dim=1)).logits[:, -3:]


@pytest.mark.parametrize(
    "merge",
    [
        lambda users: users.merge_adapter(),
        lambda users: users.merge_and_unload(),
        lambda users: (users.merge_adapter(), users.unmerge_adapter()),
    ],
    ids=["merge", "merge and unload", "unmerge"],
)
def test_merging_the_users_adapter_changes_neither_text_nor_drafts(merge):
    users = fine_tuned()
    model = with_mtp(users)
    expected, drafts = generate(users, prompt()), mask_logits(model)
    merge(users)
    torch.testing.assert_close(mask_logits(model), drafts)
    assert_exact(model, expected)


def test_deleting_ours_leaves_the_users_of_the_same_name():
    users = fine_tuned()
    expected = generate(users, prompt())
    model = get_peft_model(users, GatedLoraConfig(k=3, r=4))
    model.add_adapter("second", GatedLoraConfig(k=2, r=4))
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(generate(users, prompt()), expected)
    assert torch.equal(generate(model, prompt(), mtp=True), expected)


def test_an_adapter_trained_on_a_plain_base_loads_above_the_users_and_back(tmp_path):
    upgraded("llama", 3, dtype=torch.float64).save_pretrained(tmp_path / "plain")
    stacked = PeftModel.from_pretrained(fine_tuned(), tmp_path / "plain")
    stacked.save_pretrained(tmp_path / "stacked")
    plain, again = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("plain", "stacked"))
    assert plain.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in plain.items())


def test_copying_a_stacked_model():
    model = with_mtp(fine_tuned())
    twin = copy.deepcopy(model)
    drafts = mask_logits(model)
    torch.testing.assert_close(mask_logits(twin), drafts)
    with torch.no_grad():
        for layer in twin.base_model.gated_layers().values():
            layer.lora_B["mtp"].weight.mul_(2)
    assert not torch.allclose(mask_logits(twin), drafts)
    assert torch.equal(mask_logits(model), drafts)


def test_targeting_parameters_above_the_users_adapter_is_refused():
    users = fine_tuned()
    with pytest.raises(ValueError, match="needs a base without adapters"):
        get_peft_model(users, GatedLoraConfig(k=3, target_parameters=["mlp.experts.down_proj"]))
    assert not users.get_base_model().get_input_embeddings()._forward_hooks


def test_a_lora_added_to_an_upgraded_base_is_refused():
    model = upgraded("llama", 3, dtype=torch.float64)
    expected = mask_logits(model)
    with pytest.raises(ValueError, match="Add the adapter to the base first and then upgrade"):
        get_peft_model(model.get_base_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert torch.equal(mask_logits(model), expected)


# ---------------------------------------------------------------- a second upgrade


def upgraded_again(model: PeftModel) -> PeftModel:
    with pytest.warns(UserWarning, match="second time"):
        again = get_peft_model(model, GatedLoraConfig(k=3, r=4))
    for name, parameter in again.named_parameters():
        if name.startswith("base_model.lora_"):
            torch.nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(8))
    return again.eval()


@pytest.mark.parametrize("again", [lambda model: model, lambda model: model.get_base_model()], ids=["model", "base"])
def test_a_second_upgrade_works_and_leaves_the_first(again, tmp_path):
    first = upgraded("llama", 3, dtype=torch.float64)
    expected, drafts = generate(first, prompt()), mask_logits(first)
    second = upgraded_again(again(first))
    assert torch.equal(mask_logits(first), drafts)
    assert not torch.allclose(mask_logits(second), drafts)
    for model in (first, second):
        assert_exact(model, expected)
    assert_exact(first, expected)
    second.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(tiny_base("llama", torch.float64), tmp_path)
    torch.testing.assert_close(mask_logits(second), mask_logits(alone))


def test_loading_an_adapter_twice_on_one_base(tmp_path):
    upgraded("llama", 3, dtype=torch.float64).save_pretrained(tmp_path)
    base = tiny_base("llama", torch.float64)
    first, second = PeftModel.from_pretrained(base, tmp_path), PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(mask_logits(second), mask_logits(first))
    second.save_pretrained(tmp_path / "again")
    first, again = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())


def test_unloading_the_first_of_two_upgrades():
    first = upgraded("llama", 3, dtype=torch.float64)
    second = upgraded_again(first)
    drafts = mask_logits(second)
    first.unload()
    torch.testing.assert_close(mask_logits(second), drafts)
    assert second.unload() is first.get_base_model()
