"""Tiny stand-ins: their sizes compare as those of the configs that they come from, and kinds of layers stay."""

from itertools import combinations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig

from hf_mtp.base.sizes import WINDOW
from hf_mtp.base.tiny import tiny_config, tiny_model
from hf_mtp.evaluation.support import PROMPTS
from hf_mtp.passes.speculation_mode import PROMPT

# Fields of a config, compared pair by pair.
COMPARED = {
    "rembert": [["input_embedding_size", "hidden_size", "output_embedding_size", "intermediate_size"]],
    "electra": [["embedding_size", "hidden_size", "intermediate_size"]],
    "opt": [["word_embed_proj_dim", "hidden_size", "ffn_dim"]],
    "llama": [["num_key_value_heads", "num_attention_heads"], ["hidden_size", "intermediate_size"]],
    "mistral": [["num_key_value_heads", "num_attention_heads"], ["sliding_window", "max_position_embeddings"]],
    "gemma2": [["head_dim", "query_pre_attn_scalar"], ["sliding_window", "max_position_embeddings"]],
    "gemma3n_text": [
        ["vocab_size_per_layer_input", "vocab_size"],
        ["hidden_size_per_layer_input", "hidden_size"],
        ["num_kv_shared_layers", "num_hidden_layers"],
    ],
    "deepseek_v3": [
        ["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "qk_head_dim"],
        ["kv_lora_rank", "q_lora_rank", "hidden_size"],
        ["num_experts_per_tok", "n_routed_experts"],
        ["topk_group", "n_group"],
        ["moe_intermediate_size", "hidden_size", "intermediate_size"],
        ["first_k_dense_replace", "num_hidden_layers"],
    ],
    "qwen3_next": [
        ["num_key_value_heads", "linear_num_key_heads", "num_attention_heads", "linear_num_value_heads"],
        ["linear_key_head_dim", "linear_value_head_dim", "head_dim"],
        ["num_experts_per_tok", "num_experts"],
    ],
    "olmo_hybrid": [["linear_key_head_dim", "linear_value_head_dim"]],
    "deepseek_v4": [["index_topk", "sliding_window"], ["index_head_dim", "head_dim"]],
    "recurrent_gemma": [["lru_width", "hidden_size"]],
    "rwkv": [["attention_hidden_size", "hidden_size"]],
    "zamba2": [["attention_hidden_size", "hidden_size"], ["attention_head_dim", "kv_channels"]],
    "longcat_flash": [["moe_topk", "zero_expert_num", "n_routed_experts"]],
}
SETTINGS = {
    "opt": {"word_embed_proj_dim": 512, "hidden_size": 1024, "num_attention_heads": 16, "ffn_dim": 4096},
    "llama": {"num_key_value_heads": 8},
}


def signs(config, names: list[str]) -> list[int]:
    values = [getattr(config, name) for name in names]
    return [(one > other) - (one < other) for one, other in combinations(values, 2)]


@pytest.mark.parametrize("model_type", [name for name in COMPARED if name in CONFIG_MAPPING])
def test_sizes_compare_as_they_did(model_type):
    config = CONFIG_MAPPING[model_type](**SETTINGS.get(model_type, {}))
    small = tiny_config(config)
    for names in COMPARED[model_type]:
        assert signs(small, names) == signs(config, names), names
    assert tiny_model(config)(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize(("heads", "head_dim", "sign"), [(16, 128, 1), (16, 64, 0), (8, 64, -1)])
def test_all_heads_together_are_wider_or_narrower_than_hidden_states(heads, head_dim, sign):
    config = CONFIG_MAPPING["qwen3"](hidden_size=1024, num_attention_heads=heads, head_dim=head_dim)
    small = tiny_config(config)
    width = small.num_attention_heads * small.head_dim
    assert (width > small.hidden_size) - (width < small.hidden_size) == sign


def test_rotary_dimensions_are_a_part_of_a_head():
    small = tiny_config(CONFIG_MAPPING["gptj"]())
    assert 0 < small.rotary_dim < small.n_embd // small.n_head


@pytest.mark.parametrize(("heads", "small"), [(32, 4), (8, 2), (1, 1)])
def test_no_groups_or_some_or_one(heads, small):
    config = tiny_config(CONFIG_MAPPING["llama"](num_attention_heads=32, num_key_value_heads=heads))
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, small)


def test_texts_leave_every_window():
    config = CONFIG_MAPPING["mistral"](sliding_window=4096, max_position_embeddings=4096)
    assert tiny_config(config).sliding_window == WINDOW < min(PROMPTS[0], PROMPT)  # longer texts may be read


def test_a_state_is_as_wide_as_its_heads_together():
    for model_type, settings in (("mamba2", {}), ("bamba", {"attn_layer_indices": [9]}), ("falcon_h1", {})):
        config = tiny_config(CONFIG_MAPPING[model_type](**settings))
        prefix, width = ("mamba_", "d_head") if model_type != "mamba2" else ("", "head_dim")
        heads = config.mamba_n_heads if prefix else config.num_heads
        whole = getattr(config, "mamba_d_ssm", None) or 2 * config.hidden_size
        assert heads * getattr(config, prefix + width) == whole


def test_every_kind_of_layer_stays():
    small = tiny_config(CONFIG_MAPPING["deepseek_v3"]())
    assert (small.first_k_dense_replace, small.num_hidden_layers) == (1, 2)
    small = tiny_config(CONFIG_MAPPING["qwen3_next"]())
    assert small.layer_types == ["linear_attention", "full_attention"]
    small = tiny_config(CONFIG_MAPPING["llama4_text"]())
    assert small.num_hidden_layers == 2 and set(small.layer_types) == {"chunked_attention", "full_attention"}


def test_a_tiny_config_stays_as_it_is():
    config = AutoConfig.for_model("llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config.num_attention_heads = config.num_key_value_heads = 8
    small = tiny_config(config)
    assert (small.hidden_size, small.intermediate_size, small.num_attention_heads) == (32, 48, 8)
