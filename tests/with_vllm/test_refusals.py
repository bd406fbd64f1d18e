"""What cannot be served is refused by name, before the model is loaded or with a message to the client."""

import shutil
from types import SimpleNamespace

import pytest
from safetensors import safe_open
from safetensors.torch import save_file


def changed(case, folder, **settings) -> str:
    """A copy of the exported adapter with other settings."""
    shutil.copytree(case.adapter, folder)
    with safe_open(folder / "mtp.safetensors", "pt") as file:
        tensors, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    save_file(tensors, folder / "mtp.safetensors", {**meta, **settings})
    return str(folder)


@pytest.mark.parametrize(
    ("patch", "words"),
    [("newer_release", "tested with vLLM 0.32.*, but this is 0.33.1"), ("other_method", "differs in _preprocess")],
)
def test_other_releases_of_vllm(case, refusal, patch, words):
    assert words in refusal(case().task({}, patches=[patch]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_loras": 1}, "max_loras=1"),
        ({"max_lora_rank": 1}, "has rank 8, but max_lora_rank is 1"),
        ({"max_num_batched_tokens": 32}, "increasing max_num_batched_tokens"),
        ({"num_gpu_blocks_override": 2}, "KV cache"),
        ({"enable_prompt_embeds": True}, "embeddings as prompts"),
    ],
)
def test_settings_of_the_engine(case, refusal, arguments, words):
    assert words in refusal(case().task({}, arguments=arguments))


def test_more_masks_than_the_adapter_has(case, refusal):
    assert "has 4 masks, but num_speculative_tokens is 9" in refusal(case().task({}, k=9))


def test_adapter_of_another_base(case, refusal, tmp_path):
    task = case().task({})
    task["adapter"] = changed(case(), tmp_path / "other", base_hidden_size="32")
    assert "belongs to a base with 97 tokens and hidden states of 32" in refusal(task)


def test_a_request_with_a_lora_of_its_own_ends_alone(case, run):
    """An exception would end an engine in a process of its own, with the requests of all others."""
    case = case()
    refused, others = run(case.task({"lora": case.adapter}, {}))["groups"]
    assert {answer["reason"] for answer in refused} == {"error"} and max(
        len(answer["tokens"]) for answer in refused
    ) < 2
    assert [answer["tokens"] for answer in others] == [row["tokens"] for row in case.rows]


def supported(**changes):
    """Settings of an engine that `not_supported` has nothing to say about, but for the changes."""
    names = {
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "data_parallel_size": 1,
        },
        "scheduler_config": {"async_scheduling": False},
        "lora_config": {"max_loras": 2},
        "model_config": {
            "enable_prompt_embeds": False,
            "is_hybrid": False,
            "is_attention_free": False,
            "is_encoder_decoder": False,
            "is_multimodal_model": False,
        },
    }
    parts = {part: SimpleNamespace(**{**fields, **changes.get(part, {})}) for part, fields in names.items()}
    flags = {"use_v2_model_runner": False, "kv_transfer_config": None}
    return SimpleNamespace(**{name: changes.get(name, value) for name, value in flags.items()}, **parts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_v2_model_runner": True}, "Model Runner V2"),
        ({"parallel_config": {"pipeline_parallel_size": 2}}, "pipeline parallelism"),
        ({"parallel_config": {"decode_context_parallel_size": 2}}, "context parallelism"),
        ({"parallel_config": {"prefill_context_parallel_size": 2}}, "context parallelism"),
        ({"scheduler_config": {"async_scheduling": True}}, "asynchronous scheduling"),
        ({"parallel_config": {"data_parallel_size": 2}}, "data parallelism"),
        ({"model_config": {"is_hybrid": True}}, "bases with recurrent layers"),
        ({"model_config": {"is_multimodal_model": True}}, "bases that read more than text"),
        ({"kv_transfer_config": {}}, "transfer of caches"),
    ],
)
def test_what_is_not_supported(changes, words):
    from hf_mtp.serving.vllm.guard import not_supported

    (found,) = [what for what, found in not_supported(supported(**changes)).items() if found]
    assert words in found
    assert not any(not_supported(supported()).values())
