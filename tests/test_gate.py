"""The gate: LoRA changes masks and never regular tokens, in every way a model is run."""

import copy
import pickle
import threading

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from tiny_models import (
    CONFIGS,
    VOCAB,
    adapter_parameters,
    checkpoint_layers,
    generate,
    prompt,
    randomised,
    tiny_base,
    upgraded,
)
from torch import nn

from hf_mtp import GatedLoraConfig
from hf_mtp.adapter.gate import Gate, GatedVariant, MaskColumns, gate_lora_layer
from hf_mtp.objective.recipe import Recipe
from hf_mtp.objective.request import ObjectiveRequest

K = 3
RECIPE = Recipe(auxiliary=1.0)


def with_masks(input_ids: torch.LongTensor) -> torch.LongTensor:
    """The ids, and a block of masks after the last one."""
    return torch.cat([input_ids, torch.arange(VOCAB, VOCAB + K).expand(len(input_ids), -1)], dim=1)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_without_masks_logits_are_the_bases_to_the_bit(architecture):
    expected = tiny_base(architecture)(prompt(rows=2)).logits
    assert torch.equal(upgraded(architecture, K)(prompt(rows=2)).logits, expected)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_with_masks_logits_of_regular_tokens_are_the_bases_to_rounding(architecture):
    expected = tiny_base(architecture)(prompt(rows=2)).logits
    logits = upgraded(architecture, K)(with_masks(prompt(rows=2))).logits
    torch.testing.assert_close(logits[:, :-K], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "opt"])
def test_lora_changes_masks(architecture):
    model = upgraded(architecture, K)
    before = model(with_masks(prompt())).logits
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "lora_B" in name:
                parameter.mul_(2)
    after = model(with_masks(prompt())).logits
    assert torch.equal(before[:, :-K], after[:, :-K])
    assert ((before[:, -K:] - after[:, -K:]).abs().amax(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_not_a_number_in_lora_weights_stays_in_the_masks_of_a_layer(architecture):
    model = upgraded(architecture, K)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.fill_(torch.nan)
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    x = torch.randn(1, 5 + K, 32)
    with model.base_model.masks_in_columns(5, torch.arange(K)[None]):
        y = layer(x)
    assert torch.equal(y[:, :5], layer.base_layer(x)[:, :5])
    assert y[:, 5:].isnan().all()


def test_masks_are_computed_as_plain_lora_computes_them():
    gated = upgraded("llama", K, dtype=torch.float64, target_modules=["q_proj"])
    layer = gated.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5 + K, 32, dtype=torch.float64)
    with gated.base_model.masks_in_columns(5, torch.arange(K).expand(2, -1)):
        y = layer(x)
    plain = layer.base_layer(x)
    delta = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T * layer.scaling["default"]
    assert torch.equal(y[:, :5], plain[:, :5])
    torch.testing.assert_close(y[:, 5:], (plain + delta)[:, 5:])


def test_dora_acts_on_masks_only():
    model = upgraded("llama", K, use_dora=True)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "magnitude" in name:
                parameter.mul_(5)
    expected = tiny_base("llama")(prompt()).logits
    assert torch.equal(model(prompt()).logits, expected)
    logits = model(with_masks(prompt())).logits
    torch.testing.assert_close(logits[:, :-K], expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(generate(model, prompt(), mtp=True), generate(model, prompt()))


def test_dora_masks_are_as_pefts_own_dora():
    model = upgraded("llama", K, use_dora=True, dtype=torch.float64)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    inner = layer.lora_variant["default"].inner
    x = torch.randn(1, 4 + K, 32, dtype=torch.float64)
    with model.base_model.masks_in_columns(4, torch.arange(K)[None]):
        gated = layer(x)
    layer.lora_variant["default"] = inner
    torch.testing.assert_close(gated[:, 4:], Linear.forward(layer, x)[:, 4:])


def test_the_short_way_is_pefts_way():
    """Masks and regular tokens, against PEFT's own forward pass of the same layer."""
    model = upgraded("llama", K, dtype=torch.float64)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    x = torch.randn(2, 4 + K, layer.in_features, dtype=torch.float64)
    assert type(layer) is not Linear
    assert torch.equal(layer(x), Linear.forward(layer, x))
    with model.base_model.masks_in_columns(4, torch.arange(K).expand(2, -1)):
        gated, expected = layer(x), Linear.forward(layer, x)
    assert torch.equal(gated, expected)
    assert not torch.equal(gated, layer(x))
    with model.disable_adapter():
        assert torch.equal(layer(x), layer.base_layer(x))


def test_dropout_draws_for_masks_only():
    model = upgraded("llama", K, lora_dropout=0.5).train()
    first, second = model(with_masks(prompt())).logits, model(with_masks(prompt())).logits
    assert torch.equal(first[:, :-K], second[:, :-K])
    assert not torch.equal(first[:, -K:], second[:, -K:])


# ---------------------------------------------------------------- gradients


def text(length: int = 14, rows: int = 2, seed: int = 3) -> dict:
    input_ids = prompt(length, rows, seed)
    return {"input_ids": input_ids, "labels": input_ids}


def gradients(model, batches: list[dict], one_backward: bool = False) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the batches and the gradients accumulated over them."""
    model.train()
    model.zero_grad()
    losses = []
    for batch in batches:
        loss = model(**batch, mtp_objective=ObjectiveRequest(RECIPE)).loss
        losses.append(loss)
        if not one_backward:
            loss.backward()
    if one_backward:
        sum(losses).backward()
    return [loss.item() for loss in losses], {
        name: parameter.grad for name, parameter in adapter_parameters(model).items()
    }


def assert_same_training(one, other):
    torch.testing.assert_close(one[0], other[0])
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "opt"])
@pytest.mark.parametrize("one_backward", [False, True])
def test_gradient_checkpointing_changes_nothing(architecture, one_backward):
    options = {"attention_dropout": 0.0, "dropout": 0.0} if architecture == "opt" else {}
    options |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0) if architecture == "gpt2" else {}
    model = upgraded(tiny_base(architecture, torch.float64, **options), K).double()
    batches = [text(14), text(9, seed=4)]
    without = gradients(model, batches, one_backward)
    checkpoint_layers(model)
    assert_same_training(gradients(model, batches, one_backward), without)
    assert all(gradient.abs().sum() > 0 for gradient in without[1].values())


def test_base_that_was_checkpointed_before_it_was_upgraded():
    without = gradients(upgraded(tiny_base("llama", torch.float64), K), [text()])
    base = tiny_base("llama", torch.float64)
    checkpoint_layers(base)
    assert_same_training(gradients(upgraded(base, K), [text()]), without)


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="use_reentrant=False"):
        upgraded("llama", K).activation_checkpointing_enable({"use_reentrant": True})


def test_checkpointing_can_be_disabled_again():
    model = upgraded("llama", K, dtype=torch.float64)
    without = gradients(model, [text()])
    checkpoint_layers(model)
    checkpoint_layers(model, on=False)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert_same_training(gradients(model, [text()]), without)


def test_only_the_adapter_gets_gradients():
    model = upgraded("llama", K)
    gradients(model, [text()])
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == set(adapter_parameters(model))


# ---------------------------------------------------------------- copies, threads, other adapters


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(copied):
    model = upgraded("llama", K)
    twin = copied(model)
    expected = model(with_masks(prompt())).logits
    assert torch.equal(twin(with_masks(prompt())).logits, expected)
    randomised(twin, seed=9)
    assert torch.equal(model(with_masks(prompt())).logits, expected)
    changed = twin(with_masks(prompt())).logits
    assert torch.equal(changed[:, :-K], expected[:, :-K])
    assert not torch.equal(changed[:, -K:], expected[:, -K:])
    assert twin.base_model.gate is not model.base_model.gate


def test_copy_of_a_checkpointed_model_trains():
    model = upgraded("llama", K, dtype=torch.float64)
    without = gradients(model, [text()])
    checkpoint_layers(model)
    assert_same_training(gradients(copy.deepcopy(model), [text()]), without)


def test_two_threads_generate_at_once():
    model = upgraded("llama", K)
    prompts = [prompt(6, seed=7), prompt(15, seed=8)]
    expected = [generate(model, input_ids, 40) for input_ids in prompts]
    outputs, start = {}, threading.Barrier(2)

    def run(number: int):
        start.wait()
        outputs[number] = [generate(model, prompts[number], 40, mtp=True) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert all(torch.equal(output, expected[number]) for output in outputs[number])


def test_gate_is_per_thread_and_closes_after_errors():
    gate, columns = Gate(), MaskColumns(2, torch.zeros(1, 1, dtype=torch.long), "default")
    seen = []
    with pytest.raises(KeyError), gate.open(columns):
        thread = threading.Thread(target=lambda: seen.append(gate.columns))
        thread.start()
        thread.join()
        assert gate.columns is columns
        raise KeyError
    assert (seen, gate.columns) == ([None], None)


def test_gate_of_another_adapter_is_closed():
    model = upgraded("llama", K)
    columns = MaskColumns(0, torch.arange(K)[None], "another")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(1, K, 32)
    with model.base_model.gate.open(columns):
        assert torch.equal(layer(x), layer.base_layer(x))


# ---------------------------------------------------------------- layers


def test_layers_that_ask_no_variant_are_refused():
    class AwqLoraLinear(Linear):
        """As AWQ, AQLM, EETQ, INC and TransformerEngine layers do: LoRA is applied without a question."""

        def forward(self, x):
            return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    layer = AwqLoraLinear(nn.Linear(4, 4), "default", config=GatedLoraConfig(), r=2)
    with pytest.raises(
        ValueError, match=r"`model\.q_proj` became a PEFT layer.*AwqLoraLinear.*Target linear layers only"
    ):
        gate_lora_layer(layer, "default", Gate(), name="model.q_proj")


def test_embeddings_are_refused():
    with pytest.raises(ValueError, match="Target linear layers only"):
        get_peft_model(tiny_base(), GatedLoraConfig(target_modules=["embed_tokens"]))


def test_layers_that_see_a_selection_of_tokens_are_refused():
    model = upgraded("llama", K)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with (
        model.base_model.masks_in_columns(4, torch.arange(K)[None]),
        pytest.raises(ValueError, match=r"input of shape \(5, 32\).*exclude_modules"),
    ):
        layer(torch.randn(5, 32))


def test_flattened_tokens_are_gated():
    model = upgraded("llama", K)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 4 + K, 32)
    with model.base_model.masks_in_columns(4, torch.arange(K).expand(2, -1)):
        assert torch.equal(layer(x.flatten(0, 1)).view(2, 4 + K, -1), layer(x))


def test_every_lora_layer_is_gated():
    for architecture in CONFIGS:
        model = upgraded(architecture, K)
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        assert layers
        assert all(isinstance(layer.lora_variant["default"], GatedVariant) for layer in layers)
