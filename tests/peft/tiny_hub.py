"""The models that PEFT's tests load from the Hub, as tiny random ones in a folder that stands for the Hub's cache."""

import sys
from pathlib import Path

from tiny_models import CONFIGS
from tiny_text import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 1024  # PEFT's tests use token ids up to 1000
REVISION = "0" * 40

_COMMON = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}

# Name on the Hub: architecture, and what PEFT's tests expect of its config.
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("opt", {"num_hidden_layers": 5}),
    "peft-internal-testing/opt-125m": ("opt", {"num_hidden_layers": 12}),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("llama", {}),
    "peft-internal-testing/tiny-random-gpt2": ("gpt2", {}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("gpt2", {}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("gpt_neox", {}),
    "peft-internal-testing/tiny-random-BloomForCausalLM": ("bloom", {"n_layer": 5}),
    "peft-internal-testing/tiny-dummy-qwen2": ("qwen2", {}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("llama", {}),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("gpt_oss", {}),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "llama4_text",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "intermediate_size_mlp": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
        },
    ),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("llama", {}),
    "hf-internal-testing/tiny-random-gpt2": ("gpt2", {}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("mistral", {}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("gemma3_text", {}),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "gptj",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    ),
}


def make(cache: Path) -> None:
    """Writes all models, each with a tokenizer, into `cache`, in the layout of `HF_HUB_CACHE`."""
    for name, (architecture, options) in MODELS.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / REVISION
        config = AutoConfig.for_model(architecture, **{**_COMMON, **CONFIGS.get(architecture, {}), **options})
        AutoModelForCausalLM.from_config(config).save_pretrained(snapshot)
        tiny_tokenizer(VOCAB).save_pretrained(snapshot)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(REVISION)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
