"""Bases of every kind: a class or a config that is not a causal language model, code from the base's own folder,
embeddings tied or not, an embedding with more rows than the tokenizer has words."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import VOCAB, generate, prompt, tiny_base, upgraded
from tiny_text import tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    dynamic_module_utils,
)

from hf_mtp import GatedLoraConfig, check_support
from hf_mtp.evaluation.support import Rehearsal
from hf_mtp.passes.speculation_mode import SpeculationMode, speculation_mode

STRATEGIES = ("quadratic", "linear", "auto")
TEXT_CONFIG = tiny_base("llama").config
IMAGE_CONFIG = AutoConfig.for_model(
    "vit", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=8, patch_size=4
)


def assert_exact(model: PeftModel, ids: torch.LongTensor) -> None:
    plain = generate(model, ids)
    model.base_model.draft = Rehearsal([plain])
    for strategy in STRATEGIES:
        assert torch.equal(generate(model, ids, mtp=True, mtp_strategy=strategy), plain)


@pytest.mark.parametrize(
    ("auto_class", "config", "name"),
    [
        (AutoModel, TEXT_CONFIG, "LlamaModel"),
        (AutoModelForSequenceClassification, TEXT_CONFIG, "LlamaForSequenceClassification"),
        (AutoModelForImageClassification, IMAGE_CONFIG, "ViTForImageClassification"),  # has no vocabulary
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_class_that_is_no_causal_language_model(auto_class, config, name):
    with pytest.raises(ValueError, match=f"{name} is not a causal language model.*Load it with AutoModelForCausalLM"):
        get_peft_model(auto_class.from_config(config), GatedLoraConfig(k=2))


def test_what_is_no_transformers_model():
    with pytest.raises(TypeError, match="needs a transformers model, but got Linear"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2))[0], GatedLoraConfig(k=2, target_modules=["x"]))


def test_a_base_that_was_compiled_before_the_upgrade():
    with pytest.raises(TypeError, match="The base is compiled.*Upgrade it first"):
        get_peft_model(torch.compile(tiny_base("llama")), GatedLoraConfig(k=2))
    compiled = torch.compile(upgraded("llama"), backend="eager")
    assert torch.equal(generate(compiled, prompt(), mtp=True), generate(compiled, prompt()))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings(tied, tmp_path):
    model = upgraded(tiny_base("llama", torch.float64, tie_word_embeddings=tied), dtype=torch.float64).double()
    assert_exact(model, prompt())
    model.save_pretrained(tmp_path)
    base = tiny_base("llama", torch.float64, tie_word_embeddings=tied)
    assert_exact(PeftModel.from_pretrained(base, tmp_path).double().eval(), prompt())
    assert (base.get_input_embeddings().weight is base.get_output_embeddings().weight) == tied


def test_an_embedding_with_more_rows_than_the_tokenizer_has_words():
    tokenizer = tiny_tokenizer(VOCAB)
    base = tiny_base("llama", torch.float64, vocab_size=128)
    assert len(tokenizer) == VOCAB < 128
    model = upgraded(base, dtype=torch.float64).double()
    assert model.base_model.vocab_size == 128  # masks have the ids from there on
    ids = tokenizer("w6 w9 w12 w15 w18 w21 w24", return_tensors="pt").input_ids
    assert_exact(model, ids)
    assert (generate(model, ids, mtp=True) < 128).all()


REMOTE_CODE = """
from functools import wraps

from transformers import LlamaConfig, LlamaForCausalLM


class RemoteConfig(LlamaConfig):
    model_type = "remote"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig

    @wraps(LlamaForCausalLM.forward)  # its arguments, by name
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = -outputs.logits  # as nothing in transformers does
        return outputs
"""


def test_code_from_the_folder_of_the_base(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "base"
    base = tiny_base("llama", torch.float64)
    base.config.auto_map = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
    base.save_pretrained(folder)
    (folder / "remote.py").write_text(REMOTE_CODE, encoding="utf-8")
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    assert type(remote).__module__.startswith("transformers_modules")
    assert not torch.equal(generate(remote, prompt()), generate(base, prompt()))
    model = upgraded(remote, dtype=torch.float64).double()
    assert_exact(model, prompt())
    assert speculation_mode(model.base_model.model) is SpeculationMode.TREE
    assert check_support(model).is_exact


def test_code_that_does_not_name_its_arguments_decodes_plainly():
    base = tiny_base("llama", torch.float64)

    class Nameless(type(base)):
        def forward(self, input_ids=None, **kwargs):
            return super().forward(input_ids=input_ids, **kwargs)

    base.__class__ = Nameless
    model = upgraded(base, dtype=torch.float64).double()
    ids = {"input_ids": prompt(), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**ids, mtp=True), model.generate(**ids))
