"""Bad input gets an error that says what was passed, what is needed or what to do; and nothing is lost."""

import ast
import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, checkpoint_layers, generate, prompt, tiny_base, upgraded
from tiny_text import tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

import hf_mtp
from hf_mtp import GatedLoraConfig
from hf_mtp.adapter.base_identity import tokenizer_fingerprint

# ---------------------------------------------------------------- GatedLoraConfig


@pytest.mark.parametrize("name", ["k", "r"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", None])
def test_sizes_must_be_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1 .*got {value!r}"):
        GatedLoraConfig(**{name: value})


def test_types_that_weights_can_be_saved_in():
    with pytest.raises(ValueError, match="`save_dtype` must be one of 'float32', 'bfloat16'.* but got 'int8'"):
        GatedLoraConfig(save_dtype="int8")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("layer_replication", [(0, 2), (1, 2)]),
        ("trainable_token_indices", [3]),
    ],
)
def test_fields_that_change_the_base_are_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}=.*would change what the base model computes.*Leave `{field}` at"):
        GatedLoraConfig(**{field: value})


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_initialisations_that_rewrite_the_base_are_refused(start):
    with pytest.raises(
        ValueError, match=f"`init_lora_weights={start!r}` would change the base model's weights.*Use one of True"
    ):
        GatedLoraConfig(init_lora_weights=start)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_other_initialisations_are_taken(start):
    model = upgraded("llama", init_lora_weights=start)
    assert torch.equal(model(prompt()).logits, tiny_base("llama")(prompt()).logits)


def test_layers_are_chosen_among_those_of_a_list():
    """PEFT's error is about a `target_modules` that nobody passed."""
    with pytest.raises(ValueError, match=r"it is 'all-linear', the default. Pass a list"):
        GatedLoraConfig(layers_to_transform=[1])
    model = get_peft_model(tiny_base("llama"), GatedLoraConfig(k=2, r=2, exclude_modules=r".*layers\.0\..*"))
    assert {name.split(".")[2] for name in model.base_model.gated_layers()} == {"1"}


def test_other_tasks_are_refused():
    with pytest.raises(ValueError, match="`task_type` must be 'CAUSAL_LM'.*got 'SEQ_CLS'"):
        GatedLoraConfig(task_type="SEQ_CLS")


# ---------------------------------------------------------------- bases that cannot be upgraded


def test_encoder_decoder_is_refused():
    config = AutoConfig.for_model("t5", vocab_size=VOCAB, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model.*decoder-only"):
        get_peft_model(AutoModelForSeq2SeqLM.from_config(config), GatedLoraConfig(target_modules=["q"]))


def test_a_base_without_weights():
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(tiny_base("llama").config)
    model = get_peft_model(base, GatedLoraConfig(k=2))
    assert model(input_ids=prompt()).logits.device.type == "meta"
    with pytest.raises(ValueError, match="LlamaForCausalLM is on the meta device.*no weights"):
        generate(model, prompt(), mtp=True)


def test_a_base_without_a_decoder_of_its_own():
    class Whole(PreTrainedModel, GenerationMixin):
        config_class = PreTrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.embed, self.lm_head = torch.nn.Embedding(VOCAB, 8), torch.nn.Linear(8, VOCAB)

        def get_input_embeddings(self):
            return self.embed

        def get_output_embeddings(self):
            return self.lm_head

        def forward(self, input_ids=None, **kwargs):
            return CausalLMOutput(logits=self.lm_head(self.embed(input_ids)))

    with pytest.raises(ValueError, match="Whole has no decoder that is separate.*needs a model with `get_decoder`"):
        get_peft_model(Whole(PreTrainedConfig()), GatedLoraConfig(k=2, target_modules=["embed"]))


def test_encoder_is_refused():
    config = AutoConfig.for_model("bert", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ValueError, match="BertLMHeadModel attends to later tokens.*is_decoder=True"):
        get_peft_model(AutoModelForCausalLM.from_config(config), GatedLoraConfig())


# ---------------------------------------------------------------- generate(mtp=True)


@pytest.mark.parametrize("mtp_k", [0, -1, 4, 1.5, True, "2"])
def test_mtp_k_out_of_range(mtp_k):
    with pytest.raises(
        ValueError, match=f"`mtp_k` must be an integer from 1 to 3, the adapter's `k`, but got {mtp_k!r}"
    ):
        generate(upgraded("llama", 3), prompt(), mtp=True, mtp_k=mtp_k)


def test_unknown_strategy():
    with pytest.raises(ValueError, match="must be one of 'auto', 'quadratic', 'linear', but got 'cubic'"):
        generate(upgraded("llama"), prompt(), mtp=True, mtp_strategy="cubic")


@pytest.mark.parametrize("bad", [VOCAB, VOCAB + 2, 10_000, -1])
def test_ids_outside_the_vocabulary(bad):
    input_ids = torch.tensor([[5, 6, bad]])
    with pytest.raises(
        ValueError, match=rf"token ids from {min(5, bad)} to {max(6, bad)}.*ids 0 to 96.*own tokenizer"
    ):
        generate(upgraded("llama"), input_ids, mtp=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 selects beam search"),
        ({"num_beams": 4, "do_sample": True}, "num_beams=4 selects beam sample"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6 selects contrastive search"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 selects assisted generation"),
        ({"generation_config": GenerationConfig(num_beams=2, max_new_tokens=5)}, "num_beams=2 selects beam search"),
    ],
)
@pytest.mark.parametrize("strategy", ["quadratic", "linear", "auto"])
def test_modes_that_are_not_token_by_token(arguments, message, strategy):
    with pytest.raises(ValueError, match=f"{message}.*Leave out these settings, or `mtp=True`"):
        upgraded("llama").generate(
            prompt(), mtp=True, mtp_strategy=strategy, **{"max_new_tokens": 5, "do_sample": False, **arguments}
        )


def test_beams_of_the_models_own_generation_config():
    base = tiny_base("llama")
    base.generation_config.num_beams = 3
    with pytest.raises(ValueError, match="num_beams=3 selects beam search"):
        upgraded(base).generate(prompt(), mtp=True, max_new_tokens=5)


@pytest.mark.parametrize("setting", [{"force_words_ids": [[5]]}, {"dola_layers": "low"}, {"use_mtp": True}])
def test_what_plain_generate_refuses_is_refused(setting):
    for how in ({}, {"mtp": True}):
        with pytest.raises((ValueError, NotImplementedError), match=next(iter(setting)) if how else ""):
            generate(upgraded("llama"), prompt(), 5, **setting, **how)


def test_two_ways_to_draft():
    with pytest.raises(ValueError, match="`assistant_model` and `mtp=True` cannot be combined"):
        generate(upgraded("llama"), prompt(), mtp=True, assistant_model=tiny_base("llama"))
    with pytest.raises(ValueError, match="`custom_generate` and `mtp=True` cannot be combined"):
        generate(upgraded("llama"), prompt(), mtp=True, custom_generate=lambda *args, **kwargs: None)


def test_what_cannot_be_exact_is_refused():
    model = upgraded("llama")
    with pytest.raises(ValueError, match="'quantized' rounds keys and values in groups of tokens"):
        generate(model, prompt(), mtp=True, cache_implementation="quantized")
    config = GenerationConfig(cache_implementation="quantized", max_new_tokens=4)
    with pytest.raises(ValueError, match="'quantized' rounds keys and values in groups of tokens"):
        model.generate(prompt(), mtp=True, generation_config=config)
    with pytest.raises(ValueError, match="'paged' decodes with transformers' continuous batching"):
        generate(model, prompt(), mtp=True, cache_implementation="paged")
    with pytest.raises(ValueError, match="`mtp=True` needs a cache.*`use_cache=False`"):
        generate(model, prompt(), mtp=True, use_cache=False)


def test_a_cache_that_stays_empty_with_gradient_checkpointing():
    """GPT-2 drops its cache then, as all models do in some releases of transformers."""
    model = upgraded(tiny_base("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    checkpoint_layers(model)
    plain = generate(model, prompt())
    model.train()
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is in training mode with gradient checkpointing"):
        generate(model, prompt(), mtp=True)
    checkpoint_layers(model, on=False)
    assert torch.equal(generate(model, prompt(), mtp=True), plain)


def test_token_healing_is_refused_with_the_way_out():
    model, tokenizer = upgraded("llama"), tiny_tokenizer()
    tokenizer.bos_token = "<unk>"  # without one, transformers cannot heal
    config = GenerationConfig(max_new_tokens=4, do_sample=False, token_healing=True)
    for asked in ({"token_healing": True, "max_new_tokens": 4}, {"generation_config": config}):
        with pytest.raises(ValueError, match=r"`token_healing=True` needs the tokenizer.*`model.heal_tokens"):
            model.generate(prompt(), mtp=True, tokenizer=tokenizer, **asked)
    healed = model.heal_tokens(prompt(), tokenizer)
    assert torch.equal(generate(model, healed, mtp=True), generate(model, healed))


def test_refused_call_leaves_the_model_as_it_was():
    model = upgraded("llama")
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(prompt(), mtp=True, num_beams=2)
    assert model.mtp_statistics is None
    assert torch.equal(generate(model, prompt(), mtp=True), generate(model, prompt()))


def test_disabled_adapter_warns_and_decodes_plainly():
    model = upgraded("llama")
    expected = generate(model, prompt())
    with (
        model.disable_adapter(),
        pytest.warns(UserWarning, match="adapter is disabled, so it uses plain decoding") as caught,
    ):
        output = generate(model, prompt(), mtp=True)
    assert len(caught) == 1
    assert torch.equal(output, expected)
    assert model.mtp_statistics is None


def test_generation_says_nothing_when_all_is_well():
    model = upgraded("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, prompt(), mtp=True)


def test_base_that_was_never_upgraded_knows_no_mtp():
    with pytest.raises(ValueError, match="mtp"):
        generate(tiny_base("llama"), prompt(), mtp=True)


def test_plain_lora_knows_no_mtp():
    model = get_peft_model(tiny_base("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    with pytest.raises(ValueError, match="mtp"):
        generate(model, prompt(), mtp=True)


def test_base_without_branches_names_the_way_out():
    with pytest.raises(
        NotImplementedError, match="quadratic decoding of BloomForCausalLM.*mode is 'chain'.*mtp_strategy='auto'"
    ):
        generate(upgraded("bloom"), prompt(), mtp=True, mtp_strategy="quadratic")


def test_attention_that_takes_no_masks():
    model = upgraded("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'.*sdpa.*mtp_strategy='linear'"):
        generate(model, prompt(), mtp=True, mtp_strategy="quadratic")


# ---------------------------------------------------------------- adapters on disk


@pytest.fixture
def adapter(tmp_path):
    """Folder of an adapter for the tiny Llama."""
    upgraded("llama").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_base_of_another_hidden_size(adapter):
    base = tiny_base("llama", hidden_size=48, num_attention_heads=6)
    with pytest.raises(ValueError, match="trained for a base of hidden size 32, but LlamaForCausalLM has 48"):
        PeftModel.from_pretrained(base, adapter)


def test_base_of_another_vocabulary(adapter):
    with pytest.raises(ValueError, match="vocabulary size 97, but LlamaForCausalLM has 101"):
        PeftModel.from_pretrained(tiny_base("llama", vocab_size=101), adapter)


def test_base_with_fewer_layers(adapter):
    with pytest.raises(ValueError, match=r"adapter's weights have the unknown 14 tensor\(s\).*another base"):
        PeftModel.from_pretrained(tiny_base("llama", num_hidden_layers=1), adapter)


def with_fingerprint(adapter, base_folder, tokenizer):
    """Lets the adapter record its tokenizer, and saves a base with another one."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["tokenizer_fingerprint"] = tokenizer_fingerprint(tiny_tokenizer())
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tiny_base("llama").save_pretrained(base_folder)
    tokenizer.save_pretrained(base_folder)
    return AutoModelForCausalLM.from_pretrained(base_folder)


def test_base_with_another_tokenizer(adapter, tmp_path):
    base = with_fingerprint(adapter, tmp_path / "base", tiny_tokenizer(96))
    with pytest.raises(
        ValueError, match="trained with a tokenizer of fingerprint .*its token ids have other meanings"
    ):
        PeftModel.from_pretrained(base, adapter)


def test_base_with_the_same_tokenizer(adapter, tmp_path):
    base = with_fingerprint(adapter, tmp_path / "base", tiny_tokenizer())
    assert PeftModel.from_pretrained(base, adapter).peft_config["default"].tokenizer_fingerprint


def test_base_without_a_tokenizer_is_taken(adapter):
    with_fingerprint(adapter, adapter.parent / "base", tiny_tokenizer(96))
    assert PeftModel.from_pretrained(tiny_base("llama"), adapter)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file(adapter, share):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not a valid.*truncated.*Download it again"):
        PeftModel.from_pretrained(tiny_base("llama"), adapter)


def tampered(adapter, change) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


MASKS = "base_model.lora_mask_embeddings.weight"
TAMPERING = {
    "lack": lambda tensors: tensors.pop(MASKS),
    "have the unknown": lambda tensors: tensors.update({"base_model.model.lora_extra.weight": torch.zeros(2)}),
    "have the wrong shape": lambda tensors: tensors.update({MASKS: torch.zeros(4, 32)}),
    "have values that are not finite": lambda tensors: tensors[MASKS].fill_(torch.inf),
}


@pytest.mark.parametrize("problem", TAMPERING)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_tampered_file(adapter, problem, low_cpu_mem_usage):
    tampered(adapter, TAMPERING[problem])
    with pytest.raises(ValueError, match=rf"adapter's weights {problem}.* 1 tensor\(s\), such as .*Download it again"):
        PeftModel.from_pretrained(tiny_base("llama"), adapter, low_cpu_mem_usage=low_cpu_mem_usage)


def test_weights_of_the_base_in_the_file(adapter):
    tampered(adapter, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(VOCAB, 32)}))
    base, fresh = tiny_base("llama"), tiny_base("llama")
    with pytest.raises(ValueError, match="have the unknown 1 tensor"):
        PeftModel.from_pretrained(base, adapter)
    assert torch.equal(base.lm_head.weight, fresh.lm_head.weight)


def test_pickled_weights_are_refused(adapter):
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"adapter_model\.bin, a pickle.*adapter_model\.safetensors only: convert the file"
    ):
        PeftModel.from_pretrained(tiny_base("llama"), adapter)


def test_adapter_is_not_taken_for_a_plain_lora(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "GATED_LORA"


def test_failed_load_leaves_a_loaded_adapter_usable(adapter, tmp_path):
    model = upgraded("llama", seed=5)
    expected = generate(model, prompt(), mtp=True)
    shutil.copytree(adapter, tmp_path / "bad")
    tampered(tmp_path / "bad", TAMPERING["lack"])
    with pytest.raises(ValueError, match="weights lack"):
        model.load_adapter(tmp_path / "bad", adapter_name="second")
    model.set_adapter("default")
    assert torch.equal(generate(model, prompt(), mtp=True), expected)


def test_two_active_adapters_have_no_masks():
    model = upgraded("llama")
    model.add_adapter("second", GatedLoraConfig(k=2, r=2))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 adapters are active: .*Choose one with `set_adapter`"):
        generate(model, prompt(), mtp=True)


def _strings(package) -> list[str]:
    """The strings in the code of a package. What an f-string interpolates is left out."""
    nodes = [
        node for path in Path(package.__file__).parent.rglob("*.py") for node in ast.walk(ast.parse(path.read_bytes()))
    ]
    whole = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    parts = [
        [part for part in node.values if isinstance(part, ast.Constant)]
        for node in nodes
        if isinstance(node, ast.JoinedStr)
    ]
    return [node.value for node in whole] + ["".join(part.value for part in node) for node in parts]


def test_expected_failures_of_pefts_tests_quote_messages_that_exist():
    """`make test-peft` runs rarely, so a reworded message would be noticed late."""
    lines = Path(__file__).with_name("peft").joinpath("does_not_apply.txt").read_text(encoding="utf-8").splitlines()
    quoted = [line.rsplit('": ', 1)[0].strip('"') for line in lines if line.startswith('"')]
    strings = _strings(hf_mtp) + _strings(peft)
    assert quoted
    assert [key for key in quoted if not any(key in string for string in strings)] == []
