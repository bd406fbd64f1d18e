"""Vocabularies that grew: tokens in spare rows, and embeddings resized before or after the upgrade."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from tiny_models import VOCAB, adapter_parameters, generate, prompt, tiny_base, upgraded
from tiny_text import tiny_tokenizer
from tiny_training import K, texts, trainer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import get_logger

from hf_mtp import GatedLoraConfig, MTPTrainer
from hf_mtp.adapter.base_identity import record_tokenizer, tokenizer_fingerprint

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}


def saved_base(folder, rows: int = VOCAB):
    """A base in a folder with its tokenizer of 97 tokens, and more rows than that if wished."""
    tiny_base("llama", vocab_size=rows).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load_base(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def with_pad_token():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<my pad>"})
    return tokenizer


def train(folder, model, tokenizer, resume: bool = False, **options) -> MTPTrainer:
    made = trainer(folder, model=model, eval_dataset=texts(4), processing_class=tokenizer, **{**SAVING, **options})
    made.train(resume_from_checkpoint=resume or None)
    return made


def assert_loads(adapter, base, expected) -> None:
    loaded = PeftModel.from_pretrained(base, adapter)
    for name, parameter in adapter_parameters(expected).items():
        assert torch.equal(adapter_parameters(loaded)[name], parameter), name
    assert torch.equal(generate(loaded, prompt(), mtp=True), generate(loaded, prompt()))


def test_a_pad_token_in_a_spare_row(tmp_path):
    base, out = saved_base(tmp_path / "base", rows=104), tmp_path / "out"
    trained = train(out, upgraded(load_base(base), K), with_pad_token(), load_best_model_at_end=True)
    trained.save_model()
    assert_loads(out, load_base(base), trained.model)
    assert isinstance(AutoPeftModelForCausalLM.from_pretrained(out), PeftModel)
    resumed = train(out, upgraded(load_base(base), K), with_pad_token(), resume=True, max_steps=3)
    assert resumed.state.global_step == 3


def resized(base, after: bool):
    """A base whose embeddings have grown by one row, before or after the upgrade."""
    model, tokenizer = load_base(base), with_pad_token()
    if after:
        model = upgraded(model, K)
    model.resize_token_embeddings(len(tokenizer))
    return (model if after else upgraded(model, K)), tokenizer


@pytest.mark.parametrize("after", [False, True])
def test_resized_embeddings(after, tmp_path):
    base, out = saved_base(tmp_path / "base"), tmp_path / "out"
    trained = train(out, *resized(base, after), load_best_model_at_end=True)
    trained.save_model()
    for folder in (out, out / "checkpoint-1"):
        assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert_loads(out, load_base(base), trained.model)  # as it is on the disk
    grown = load_base(base)
    grown.resize_token_embeddings(VOCAB + 1)
    assert_loads(out, grown, trained.model)
    assert AutoPeftModelForCausalLM.from_pretrained(out).base_model.vocab_size == VOCAB + 1  # PEFT resizes it
    resumed = train(out, *resized(base, after), resume=True, max_steps=3)
    assert resumed.state.global_step == 3


def test_a_chat_template_that_brings_tokens_to_an_upgraded_model(tmp_path):
    """TRL resizes the embeddings of the upgraded model."""
    base, out = saved_base(tmp_path / "base"), tmp_path / "out"
    source = tiny_tokenizer()
    source.add_tokens(["<new>"])
    source.save_pretrained(tmp_path / "source")
    model = upgraded(load_base(base), K)
    trained = train(out, model, tiny_tokenizer(), chat_template_path=str(tmp_path / "source"))
    assert model.base_model.vocab_size == 128 and model.active_peft_config.base_vocab_size == 128
    trained.save_model()
    assert_loads(out, load_base(base), model)


def test_a_base_whose_tokenizer_grew_after_the_training(tmp_path):
    base, out = saved_base(tmp_path / "base"), tmp_path / "out"
    trained = train(out, upgraded(load_base(base), K), tiny_tokenizer())
    trained.save_model()
    with_pad_token().save_pretrained(base)
    assert_loads(out, load_base(base), trained.model)
    tiny_tokenizer(96).save_pretrained(base)
    with pytest.raises(ValueError, match="its token ids have other meanings"):
        PeftModel.from_pretrained(load_base(base), out)


def test_a_tokenizer_that_is_not_the_bases_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(get_logger("hf_mtp"), "propagate", True)
    base, other = saved_base(tmp_path / "base"), tiny_tokenizer()
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"w10"', '"@"').replace('"w11"', '"w10"').replace('"@"', '"w11"'))
    other = type(other).from_pretrained(tmp_path / "other")
    trained = train(tmp_path / "out", upgraded(load_base(base), K), other, max_steps=1)
    assert "and the one of base have different ids for 2 tokens, such as 'w1" in caplog.text
    trained.save_model()
    assert trained.model.active_peft_config.tokenizer_fingerprint == tokenizer_fingerprint(tiny_tokenizer())
    assert_loads(tmp_path / "out", load_base(base), trained.model)


def test_the_tokenizer_of_a_base_is_that_of_its_commit(monkeypatch):
    model, calls = tiny_base("llama"), []
    model.config._name_or_path, model.config._commit_hash = "me/base", "0" * 40
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *names, **hub: calls.append(hub) or tiny_tokenizer())
    record_tokenizer(GatedLoraConfig(k=2, r=2), tiny_tokenizer(), model)
    assert calls == [{"revision": "0" * 40, "local_files_only": True}]


@pytest.mark.parametrize("options", [{"safe_serialization": False}, {"save_embedding_layers": True}])
def test_files_that_would_be_refused_are_not_written(options, tmp_path):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"`{name}={value}` would write a file that cannot be loaded"):
        upgraded("llama", K).save_pretrained(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
