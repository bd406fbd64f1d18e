"""What vLLM and the settings of the engine must be: anything else is refused before the model is loaded."""

import inspect

import vllm
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu_input_batch import CachedRequestState
from vllm.v1.worker.gpu_model_runner import ExecuteModelState

from .adapter import ExportedAdapter
from .arguments import ADAPTER

TESTED = "0.32."
ANY_VERSION = "hf_mtp_any_version"

# Methods of Model Runner V1 that `MaskRunner` overrides, with the parameters that it gives or reads by name.
METHODS = {
    "add_lora": "lora_request",
    "execute_model": "scheduler_output intermediate_tensors",
    "_update_states": "scheduler_output",
    "_calc_spec_decode_metadata": "num_draft_tokens cu_num_scheduled_tokens",
    "_sample": "logits spec_decode_metadata",
    "set_active_loras": "input_batch num_scheduled_tokens num_sampled_tokens mapping_type",
    "_determine_batch_execution_and_padding": "num_tokens num_reqs num_scheduled_tokens_np max_num_scheduled_tokens "
    "use_cascade_attn allow_microbatching force_eager force_uniform_decode force_has_lora force_num_active_loras "
    "num_encoder_reqs",
    "_preprocess": "scheduler_output num_input_tokens intermediate_tensors",
    "propose_draft_token_ids": "scheduler_output sampled_token_ids sampling_metadata hidden_states "
    "sample_hidden_states aux_hidden_states spec_decode_metadata common_attn_metadata slot_mappings",
    "_input_fits_in_drafter": "common_attn_metadata",
}
# Fields that it reads.
FIELDS = {
    SchedulerOutput: "num_scheduled_tokens total_num_scheduled_tokens scheduled_spec_decode_tokens scheduled_new_reqs "
    "scheduled_cached_reqs num_spec_tokens_to_schedule",
    NewRequestData: "req_id prompt_token_ids num_computed_tokens block_ids sampling_params",
    CachedRequestData: "req_ids num_computed_tokens num_output_tokens new_block_ids resumed_req_ids",
    CachedRequestState: "block_ids prompt_token_ids sampling_params",
    ExecuteModelState: "scheduler_output",
}


def check_signatures(runner: type, settings: dict) -> None:
    """Checks the release of vLLM and what is overridden of it.

    Args:
        runner (`type`): The class of the platform's model runner.
        settings (`dict`): The engine's `additional_config`.

    Raises:
        RuntimeError: This release was not tested, or differs in a method or field that is needed.
    """
    changed = [name for name, known in METHODS.items() if _parameters(runner, name) != known.split()]
    for cls, names in FIELDS.items():
        changed += [f"{cls.__name__}.{name}" for name in names.split() if name not in inspect.get_annotations(cls)]
    tested = f"hf_mtp was tested with vLLM {TESTED}*"
    if changed:
        raise RuntimeError(
            f"vLLM {vllm.__version__} differs in {', '.join(changed)}. {tested}. Install such a release."
        )
    if not vllm.__version__.startswith(TESTED) and not settings.get(ANY_VERSION):
        raise RuntimeError(
            f"{tested}, but this is {vllm.__version__}. What hf_mtp overrides looks alike. Run the tests in "
            f'tests/with_vllm with this release, then add "{ANY_VERSION}": true to additional_config.'
        )


def check_config(config: VllmConfig) -> None:
    """Checks the settings of the engine, and the adapter against its base.

    Args:
        config (`VllmConfig`): The settings.

    Raises:
        ValueError: One is not supported.
    """
    if config.speculative_config is None or config.lora_config is None or ADAPTER not in config.additional_config:
        raise ValueError(
            "hf_mtp needs speculative_config, enable_lora and additional_config. Start vLLM with all of "
            "hf_mtp.serving.vllm.arguments.engine_arguments(folder), or with hf-mtp serve --engine vllm."
        )
    for what, found in not_supported(config).items():
        if found:
            raise ValueError(f"hf_mtp does not support {what} in vLLM.")
    adapter = ExportedAdapter.read(config.additional_config[ADAPTER])
    for problem, found in _misfits(config, adapter).items():
        if found:
            raise ValueError(f"The adapter in {adapter.folder} {problem}")


def not_supported(config: VllmConfig) -> dict[str, bool]:
    """What cannot be served, and whether the settings ask for it.

    Args:
        config (`VllmConfig`): The settings.
    """
    model, parallel = config.model_config, config.parallel_config
    return {
        "Model Runner V2 (set VLLM_USE_V2_MODEL_RUNNER=0)": config.use_v2_model_runner,
        "pipeline parallelism (use tensor parallelism)": parallel.pipeline_parallel_size > 1,
        "context parallelism (use tensor parallelism)": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "asynchronous scheduling (set async_scheduling to False)": config.scheduler_config.async_scheduling,
        "embeddings as prompts (leave enable_prompt_embeds out)": model.enable_prompt_embeds,
        "bases with recurrent layers (use hf-mtp serve without vLLM)": model.is_hybrid or model.is_attention_free,
        "encoder-decoder bases": model.is_encoder_decoder,
        "bases that read more than text": model.is_multimodal_model,
        "data parallelism (start several engines)": parallel.data_parallel_size > 1,
        "transfer of caches between engines": config.kv_transfer_config is not None,
        # On a CPU, vLLM applies the last slot to rows without LoRA.
        "max_loras=1 (set it to 2, because the last LoRA slot must stay empty)": config.lora_config.max_loras < 2,
    }


def _misfits(config: VllmConfig, adapter: ExportedAdapter) -> dict[str, bool]:
    rank, k = config.lora_config.max_lora_rank, config.speculative_config.num_speculative_tokens
    model, size = config.model_config, f"{adapter.vocab_size} tokens and hidden states of {adapter.hidden_size}"
    other = f"{model.get_vocab_size()} tokens and hidden states of {model.get_hidden_size()}"
    return {
        f"has rank {adapter.rank}, but max_lora_rank is {rank}. Raise it.": rank < adapter.rank,
        f"has {adapter.k} masks, but num_speculative_tokens is {k}. Choose 1 to {adapter.k}.": not 1 <= k <= adapter.k,
        f"belongs to a base with {size}, but {model.model} has {other}. Serve {adapter.base}.": size != other,
    }


def _parameters(runner: type, method: str) -> list[str]:
    return list(inspect.signature(getattr(runner, method)).parameters)[1:]
