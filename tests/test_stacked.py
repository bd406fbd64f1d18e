"""MTP on top of a user's own LoRA or DoRA, which stays active for all tokens and can be switched as before."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import adapter_parameters, generate, prompt, randomised, tiny_base

from hf_mtp import GatedLoraConfig
from hf_mtp.evaluation.support import Rehearsal
from hf_mtp.objective.recipe import Recipe


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
    layer = tuner.model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    index = torch.arange(3)[None]
    with tuner.masks_in_columns(2, index), torch.no_grad():
        y = layer(x)
    users, scale = layer.base_layer, layer.scaling["mtp"]
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
    model(input_ids=prompt(), mtp_recipe=Recipe()).loss.backward()
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


def test_two_adapters_of_one_name_are_refused():
    users = fine_tuned()
    expected = generate(users, prompt())
    with pytest.raises(ValueError, match="adapter named 'default' of its own.*adapter_name='mtp'"):
        get_peft_model(users, GatedLoraConfig(k=3))
    assert torch.equal(generate(users, prompt()), expected)
    assert set(users.get_base_model().peft_config) == {"default"}
