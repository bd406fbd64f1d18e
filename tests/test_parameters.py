"""Fused weights of experts (`target_parameters`): LoRA for masks only, in modules that read one row per token."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_layers
from tiny_models import VOCAB, adapter_parameters, checkpoint_layers, generate, prompt, randomised, tiny_base, upgraded
from transformers import CONFIG_MAPPING, CompileConfig

from hf_mtp import GatedLoraConfig
from hf_mtp.base.sizes import VOCAB as TINY_VOCAB
from hf_mtp.base.tiny import tiny_model
from hf_mtp.evaluation.support import Rehearsal
from hf_mtp.objective.recipe import Recipe
from hf_mtp.objective.request import ObjectiveRequest

K = 3
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ARCHITECTURES = ["mixtral", "qwen3_moe", "gpt_oss"]


def base_of(architecture: str = "mixtral"):
    base = tiny_base(architecture, torch.float64)
    base.set_experts_implementation("eager")  # others are not made for float64
    return base


def model_of(architecture: str = "mixtral", base=None, **options):
    base = base or base_of(architecture)
    return upgraded(base, K, target_parameters=EXPERTS, **options).double()


def with_masks(input_ids: torch.LongTensor) -> torch.LongTensor:
    return torch.cat([input_ids, torch.arange(VOCAB, VOCAB + K).expand(len(input_ids), -1)], dim=1)


def experts_of(model, layer: int = 0):
    return model.get_base_model().model.layers[layer].mlp.experts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_is_exact(architecture):
    base, ids = base_of(architecture), prompt(rows=2)
    plain, logits = generate(base, ids), base(ids).logits
    model = model_of(base=base)
    assert torch.equal(model(ids).logits, logits)
    torch.testing.assert_close(model(with_masks(ids)).logits[:, :-K], logits)
    model.base_model.draft = Rehearsal([row[None] for row in plain])
    for strategy in ("quadratic", "linear", "auto"):
        assert torch.equal(generate(model, ids, mtp=True, mtp_strategy=strategy), plain)
    unloaded = model.unload()
    assert torch.equal(unloaded(ids).logits, logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_masks_are_computed_as_pefts_own_wrappers_compute_them(architecture):
    experts = experts_of(model := model_of(architecture))
    states = torch.randn(2, 5 + K, 32, dtype=torch.float64)
    index = torch.rand(2, 5 + K, 4).argsort(-1)[..., :2]
    weights = torch.rand(2, 5 + K, 2, dtype=torch.float64)
    plain = experts.get_base_layer()(*(value.flatten(0, 1) for value in (states, index, weights)))
    with model.base_model.masks_in_columns(5, torch.arange(K).expand(2, -1)):
        found = experts(*(value.flatten(0, 1) for value in (states, index, weights))).view(2, 5 + K, 32)
    torch.testing.assert_close(found[:, :5], plain.view(2, 5 + K, 32)[:, :5])
    twin = copy.deepcopy(experts)
    twin.__class__ = twin.base_layer.__class__ = peft_layers.ParamWrapper
    expected = twin(*(value[:, 5:].flatten(0, 1) for value in (states, index, weights))).view(2, K, 32)
    torch.testing.assert_close(found[:, 5:], expected)
    assert (found[:, 5:] - plain.view(2, 5 + K, 32)[:, 5:]).abs().min() > 0


def test_a_router_gives_several_tensors():
    model = upgraded(base_of("mixtral"), K, target_parameters=["mlp.gate.weight"], dtype=torch.float64).double()
    router, states = model.get_base_model().model.layers[0].mlp.gate, torch.randn(2, 5 + K, 32, dtype=torch.float64)
    plain = router(states.flatten(0, 1))
    with model.base_model.masks_in_columns(5, torch.arange(K).expand(2, -1)):
        found = router(states.flatten(0, 1))
    assert [part.shape for part in found] == [part.shape for part in plain]
    torch.testing.assert_close(found[0].view(2, 5 + K, -1)[:, :5], plain[0].view(2, 5 + K, -1)[:, :5])
    assert not torch.equal(found[0], plain[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_reaches_every_parameter(checkpointing):
    model, ids = model_of("qwen3_moe").train(), prompt(14, 2)
    if checkpointing:
        checkpoint_layers(model)
    model(input_ids=ids, labels=ids, mtp_objective=ObjectiveRequest(Recipe(auxiliary=1.0))).loss.backward()
    gradients = {name: parameter.grad for name, parameter in adapter_parameters(model).items()}
    assert any("experts" in name for name in gradients)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(gradients)


def test_an_adapter_on_disk_and_a_second_one(tmp_path):
    model = model_of("qwen3_moe")
    expected = model(with_masks(prompt())).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of("qwen3_moe"), tmp_path).double().eval()
    assert torch.equal(loaded(with_masks(prompt())).logits, expected)
    loaded.add_adapter("other", GatedLoraConfig(k=K, r=2, target_parameters=EXPERTS))
    randomised(loaded.double(), seed=5)
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(loaded.double()(with_masks(prompt())).logits, expected)
    loaded.set_adapter("other")
    assert not torch.equal(loaded(with_masks(prompt())).logits, expected)
    with loaded.disable_adapter():
        assert torch.equal(loaded(prompt()).logits, base_of("qwen3_moe")(prompt()).logits)


def test_modules_keep_their_own_weights_meanwhile():
    model = model_of()
    experts, seen = experts_of(model), []
    module = experts.get_base_layer()
    own = dict(module.named_parameters())
    module.act_fn.register_forward_hook(lambda *_: seen.append(dict(module.named_parameters()) == own))
    model(with_masks(prompt()))
    assert seen and all(seen)


def test_one_compiled_graph():
    base = tiny_base("qwen3_moe")
    model, graphs = model_of(base=base).float(), []
    plain = generate(model, prompt(), 12)
    torch._dynamo.reset()
    options = CompileConfig(
        fullgraph=True, dynamic=False, mode=None, backend=lambda graph, inputs: graphs.append(graph) or graph
    )
    how = {"mtp": True, "mtp_strategy": "quadratic", "cache_implementation": "static", "compile_config": options}
    assert torch.equal(generate(model, prompt(), 12, **how), plain)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_experts_that_read_a_selection_are_refused():
    base = tiny_model(CONFIG_MAPPING["llama4_text"]())
    model = upgraded(base, K, target_parameters=["experts.gate_up_proj"]).double()
    with pytest.raises(ValueError, match="`target_parameters` got an input of shape.*Leave out `target_parameters`"):
        ids = torch.tensor([[1, 2, 3, 4, TINY_VOCAB, TINY_VOCAB + 1]])
        model(ids)


def test_what_the_users_own_adapter_adapts():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], target_parameters=EXPERTS, r=2)
    users = randomised(get_peft_model(base_of(), config)).double().eval()
    plain = generate(users, prompt())
    model = get_peft_model(users, GatedLoraConfig(k=K, r=2), adapter_name="mtp").eval()
    model.base_model.draft = Rehearsal([plain])
    assert torch.equal(generate(model, prompt(), mtp=True, mtp_strategy="quadratic"), plain)
    users = get_peft_model(base_of(), config)
    with pytest.raises(ValueError, match="`target_parameters=.*needs a base without adapters"):
        get_peft_model(users, GatedLoraConfig(k=K, r=2, target_parameters=EXPERTS), adapter_name="mtp")


def test_weights_that_are_elsewhere_are_refused():
    model = model_of()
    module = experts_of(model).get_base_layer()
    module.down_proj = torch.nn.Parameter(module.down_proj.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match="`down_proj` is offloaded.*device_map"):
        model(with_masks(prompt()))


def test_embeddings_are_refused():
    with pytest.raises(ValueError, match="masks do not use the base's embeddings"):
        upgraded("llama", target_parameters=["embed_tokens.weight"])


def test_merging_is_refused():
    model = model_of()
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_adapter()
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        experts_of(model).merge()


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_an_adapter_for_each_row_is_refused_as_peft_refuses_it(method):
    model = upgraded(tiny_base("mixtral"), K, target_parameters=EXPERTS)
    with pytest.raises(ValueError, match="ParamWrapper does not support mixed adapter batches"):
        getattr(model, method)(input_ids=prompt(rows=2), adapter_names=["__base__", "default"])


def users_lora(base, parameter: str) -> PeftModel:
    """The user's own LoRA on a parameter of the experts, with the same weights for every base."""
    config = LoraConfig(r=4, target_modules=[], target_parameters=[parameter], task_type="CAUSAL_LM")
    model, generator = get_peft_model(base, config, adapter_name="users"), torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if ".users." in name:
            torch.nn.init.normal_(weight, 0, 0.3, generator=generator)
    return model.double().eval()


@pytest.mark.parametrize("unload", ["unload", "merge_and_unload"])
def test_the_users_lora_on_another_parameter_of_gated_experts_acts_and_goes_again(unload):
    expected = generate(users_lora(base_of(), EXPERTS[0]), prompt())
    plain = generate(base_of(), prompt())
    assert not torch.equal(expected, plain)
    model = upgraded(base_of(), K, target_parameters=EXPERTS[1:], target_modules=[]).double()
    users = users_lora(model.get_base_model(), EXPERTS[0])
    assert torch.equal(generate(users, prompt()), expected)
    assert torch.equal(generate(model, prompt(), mtp=True), expected)
    getattr(users, unload)()
    assert not any("users" in name for name, _ in model.named_parameters())
    left = plain if unload == "unload" else expected
    assert torch.equal(generate(model, prompt(), mtp=True), left)
    assert torch.equal(generate(model.unload(), prompt()), left)


def test_the_users_lora_on_a_gated_parameter_is_refused():
    model = upgraded(base_of(), K, target_parameters=EXPERTS)
    with pytest.raises(ValueError, match="Add the adapter to the base first and then upgrade"):
        users_lora(model.get_base_model(), EXPERTS[0])
