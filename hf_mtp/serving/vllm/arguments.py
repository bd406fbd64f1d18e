"""The arguments that vLLM needs for an exported adapter, for Python and for the command line. Imports no vLLM."""

import json

from .adapter import ExportedAdapter

ADAPTER, STRATEGY = "hf_mtp", "hf_mtp_strategy"  # keys of additional_config
OTHER_LORA = "hf_mtp needs vLLM's LoRA for its masks. Start another engine for it."
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as max_lora_rank


def engine_arguments(folder: str, k: int | None = None, strategy: str = "auto") -> dict:
    """Arguments of vLLM's `LLM` or `AsyncEngineArgs`, the model among them.

    Args:
        folder (`str`): The exported adapter.
        k (`int`, *optional*): Most masks per request; by default all that the adapter has.
        strategy (`str`, *optional*, defaults to `"auto"`): `"auto"` computes masks where they are expected to pay:
            fewer or none when many requests run. `"linear"` always computes k.

    Raises:
        ValueError: The folder is no exported adapter, its kind of adapter cannot be served, or there is no such
            strategy.
    """
    if strategy not in ("auto", "linear"):
        raise ValueError(f"The strategy must be auto or linear in vLLM, but is {strategy!r}.")
    adapter = ExportedAdapter.read(folder)
    if adapter.rank > RANKS[-1]:
        raise ValueError(f"{folder} has rank {adapter.rank}, but vLLM takes LoRAs of rank {RANKS[-1]} at most.")
    return {
        "model": adapter.base,
        "worker_cls": "hf_mtp.serving.vllm.worker.Worker",
        "scheduler_cls": "hf_mtp.serving.vllm.scheduler.MaskScheduler",
        "speculative_config": {
            "method": "custom_class",
            "model": "hf_mtp.serving.vllm.drafter.Drafter",
            "num_speculative_tokens": adapter.k if k is None else k,
        },
        "additional_config": {ADAPTER: folder, STRATEGY: strategy},
        "enable_lora": True,
        "max_loras": 2,  # the last slot stays empty
        "max_lora_rank": next(rank for rank in RANKS if rank >= adapter.rank),
        "lora_target_modules": adapter.modules,
    }


def command_line(arguments: dict) -> list[str]:
    """The arguments as options of `vllm serve`.

    Args:
        arguments (`dict`): Made by [`engine_arguments`].
    """
    options = []
    for name, value in arguments.items():
        options.append(f"--{name.replace('_', '-')}")
        if isinstance(value, list):
            options += value
        elif value is not True:
            options.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return options
