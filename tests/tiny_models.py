"""Tiny random models, built from a config without any download, and upgraded ones with random adapter weights."""

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_mtp import GatedLoraConfig
from hf_mtp.base.caches import cache_name
from hf_mtp.decoding.statistics import MTPGenerateOutput

CACHE = cache_name(MTPGenerateOutput.__dataclass_fields__)  # what this release of transformers calls it
VOCAB = 97
WINDOW = 7  # shorter than every prompt below, so that sliding windows bite

_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
_GPT_LIKE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
_WITH_HEAD_DIM = {**_LLAMA_LIKE, "head_dim": 8}
_LOCAL_AND_GLOBAL = {
    **_WITH_HEAD_DIM,
    "tie_word_embeddings": False,  # tied, a random model of these repeats the last token for ever
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}

CONFIGS = {
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": WINDOW},
    "qwen2": _LLAMA_LIKE,
    "qwen3": _WITH_HEAD_DIM,
    "gemma2": {**_LOCAL_AND_GLOBAL, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_LOCAL_AND_GLOBAL, "query_pre_attn_scalar": 8},
    "gpt2": _GPT_LIKE,
    "gpt_neox": {**_LLAMA_LIKE, "hidden_dropout": 0.0},
    "phi3": {**_LLAMA_LIKE, "original_max_position_embeddings": 128},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "init_std": 0.3,
        "pad_token_id": 1,
    },
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 4},
    "gpt_oss": {
        **_LOCAL_AND_GLOBAL,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "olmo2": _LLAMA_LIKE,
    "cohere": {**_LLAMA_LIKE, "logit_scale": 1.0},
    "granite": {**_LLAMA_LIKE, "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "logits_scaling": 0.5},
    "starcoder2": {**_LLAMA_LIKE, "sliding_window": WINDOW},
    "qwen3_moe": {
        **_WITH_HEAD_DIM,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "falcon": {**_LLAMA_LIKE, "tie_word_embeddings": False, "num_kv_heads": 2, "new_decoder_architecture": True},
    "phi": {**_LLAMA_LIKE, "partial_rotary_factor": 0.5},
    "bloom": {"tie_word_embeddings": False, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
}

# Alibi: the position of a token is its distance in columns, which a branch cannot have.
WITHOUT_BRANCHES = {"bloom"}


def tiny_base(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **overrides
) -> PreTrainedModel:
    """A random model of `architecture` in evaluation mode, with no end-of-sequence token of its own."""
    options = {
        "vocab_size": VOCAB,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **CONFIGS[architecture],
        **overrides,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **options)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def upgraded(
    base: PreTrainedModel | str = "llama", k: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32, **config
) -> PeftModel:
    """An upgraded model in evaluation mode whose adapter weights are random and far from zero."""
    base = tiny_base(base, dtype=dtype) if isinstance(base, str) else base
    model = get_peft_model(base, GatedLoraConfig(**{"k": k, "r": 4, "lora_alpha": 8, **config}))
    return randomised(model, seed).eval()


def decoding_plainly() -> PeftModel:
    """An upgraded model of a type without a cache, for which `mtp_strategy="auto"` is plain decoding."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("openai-gpt", vocab_size=VOCAB, **_GPT_LIKE)
    return upgraded(AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def randomised(model: PeftModel, seed: int = 1) -> PeftModel:
    """Draws all adapter weights anew, LoRA's B and the sampler's gains included, which start at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "lora_dropout" not in name:
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model


def prompt(length: int = 11, rows: int = 1, seed: int = 2) -> torch.LongTensor:
    """`(rows, length)` random ids, none of which is special in any of the models."""
    return torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def adapter_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def generate(model, input_ids: torch.LongTensor, new_tokens: int = 20, **kwargs):
    """Greedy generation."""
    return model.generate(input_ids=input_ids, max_new_tokens=new_tokens, do_sample=False, **kwargs)


def checkpoint_layers(model, on: bool = True) -> None:
    """Switches activation checkpointing, by the name that the installed transformers has for it."""
    name = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_{'enable' if on else 'disable'}")()
