"""Models that do more than unembed: a prediction head, sizes that differ, tables of their own for token ids."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import generate, prompt, randomised, tiny_base, upgraded
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_mtp import GatedLoraConfig
from hf_mtp.base.head import PredictionHead, prediction_head
from hf_mtp.base.inspection import decoder_of
from hf_mtp.base.tiny import tiny_config, tiny_model
from hf_mtp.evaluation.support import Rehearsal
from hf_mtp.objective.compute import _base_choices
from hf_mtp.objective.recipe import Recipe
from hf_mtp.objective.request import ObjectiveRequest

HEADS = {  # the layers from hidden states to logits
    "llama": (),
    "bert": ("cls",),
    "rembert": ("cls",),
    "roberta": ("lm_head",),
    "electra": ("generator_predictions", "generator_lm_head"),
    "modernbert-decoder": ("lm_head", "decoder"),
}
IDS = torch.tensor([[5, 9, 13, 17, 21, 7, 11, 30]])


def config_of(model_type: str):
    settings = {} if model_type in ("llama", "modernbert-decoder") else {"is_decoder": True}
    return CONFIG_MAPPING[model_type](**settings)


def tiny_upgraded(model_type: str) -> PeftModel:
    model = get_peft_model(tiny_model(config_of(model_type)), GatedLoraConfig(k=3, r=4, lora_alpha=8))
    return randomised(model).double().eval()


@pytest.mark.parametrize(("model_type", "names"), HEADS.items())
def test_hidden_states_become_the_logits_of_the_base(model_type, names):
    tuner = tiny_upgraded(model_type).base_model
    with torch.no_grad(), tuner.capture_hidden_states() as capture:
        logits = tuner.model(input_ids=IDS).logits
    torch.testing.assert_close(tuner.unembedding()(capture.states), logits)
    assert tuner.head.names == names


@pytest.mark.parametrize("model_type", ["rembert", "electra"])
def test_sizes_of_embedding_hidden_state_and_output_that_differ(model_type, tmp_path):
    model = tiny_upgraded(model_type)
    base, sampler = model.get_base_model(), model.base_model.sampler_head()
    sizes = [layer.weight.shape[1] for layer in (base.get_input_embeddings(), base.get_output_embeddings())]
    hidden = base.config.hidden_size
    assert hidden not in sizes
    assert (sampler.blocks[0].in_features, sampler.blocks[0].out_features) == (sizes[0] + hidden, hidden)

    plain = generate(model, IDS)
    for draft in (model.base_model.draft, Rehearsal([plain], model.base_model.draft)):
        model.base_model.draft = draft
        for strategy in ("quadratic", "linear", "auto"):
            assert torch.equal(generate(model, IDS, mtp=True, mtp_strategy=strategy), plain)

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(config_of(model_type)), tmp_path).double().eval()
    assert torch.equal(generate(again, IDS, mtp=True), plain)
    assert again.base_model.active_mtp_config.base_hidden_size == hidden


@pytest.mark.parametrize("model_type", ["rembert", "electra", "roberta"])
def test_training_teaches_what_the_whole_head_says(model_type):
    model = tiny_upgraded(model_type)
    ids = IDS.repeat(2, 1)
    objective = model(input_ids=ids, labels=ids, mtp_objective=ObjectiveRequest(Recipe(targets="model")))
    objective.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    tuner = model.base_model
    with torch.no_grad(), tuner.capture_hidden_states() as capture:
        logits = tuner.model(input_ids=ids).logits
    column = torch.arange(1, ids.shape[1]).expand(2, -1)
    choices = _base_choices(tuner.unembedding(), capture.states, column)
    assert torch.equal(choices[:, :-1], logits.argmax(dim=-1)[:, :-1])


def test_a_bridge_that_is_no_layer_is_refused_by_name():
    base = tiny_base("llama")

    class Bridged(type(base)):
        def forward(self, input_ids=None, **kwargs):
            outputs = self.model(input_ids=input_ids)
            outputs["logits"] = self.lm_head(outputs.last_hidden_state @ self.bridge)
            return outputs

    base.__class__ = Bridged
    base.lm_head = nn.Linear(24, base.config.vocab_size)
    base.bridge = nn.Parameter(torch.randn(32, 24))
    with pytest.raises(ValueError, match="Bridged cannot be upgraded: its decoder returns hidden states of size 32"):
        get_peft_model(base, GatedLoraConfig(k=2, target_modules=["q_proj"]))


def test_a_base_without_weights_is_not_run():
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(tiny_config(config_of("bert")))
    assert prediction_head(base) == PredictionHead((), base.config.hidden_size)


def test_the_decoder_never_sees_ids_of_masks():
    model = upgraded("llama", dtype=torch.float64).double()
    base, seen = model.get_base_model(), []
    decoder_of(base).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["input_ids"]).max()), with_kwargs=True
    )
    plain = generate(model, prompt())
    assert torch.equal(generate(model, prompt(), mtp=True, mtp_strategy="quadratic"), plain)
    ids = prompt(rows=2)
    model(input_ids=ids, labels=ids, mtp_objective=ObjectiveRequest()).loss.backward()
    assert seen and max(seen) < base.config.vocab_size


@pytest.mark.skipif("deepseek_v4" not in CONFIG_MAPPING, reason="this transformers does not have it")
def test_experts_chosen_by_token_id():
    base = tiny_model(CONFIG_MAPPING["deepseek_v4"]())
    assert "hash_moe" in base.config.mlp_layer_types
    model = randomised(get_peft_model(base, GatedLoraConfig(k=2, r=2))).double().eval()
    plain = generate(model, IDS)
    assert torch.equal(generate(model, IDS, mtp=True, mtp_strategy="linear"), plain)
    assert model(input_ids=IDS, labels=IDS, mtp_objective=ObjectiveRequest()).loss.isfinite()


@pytest.mark.skipif("hy_v4" not in CONFIG_MAPPING, reason="this transformers does not have it")
def test_an_unembedding_that_is_kept_in_float32():
    base = AutoModelForCausalLM.from_config(tiny_config(CONFIG_MAPPING["hy_v4"]()), dtype=torch.bfloat16).eval()
    assert base.lm_head.weight.dtype == torch.float32 != base.dtype
    model = get_peft_model(base, GatedLoraConfig(k=2, r=2)).eval()
    assert generate(model, IDS, mtp=True, mtp_strategy="linear").shape == (1, 28)
    assert model(input_ids=IDS, labels=IDS, mtp_objective=ObjectiveRequest()).loss.isfinite()
