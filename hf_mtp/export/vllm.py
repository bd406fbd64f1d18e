"""The folder that the integration with vLLM reads: a plain LoRA, and `mtp.safetensors` with the rest of an adapter.

docs/export.md describes the format.
"""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file

from .files import AdapterFiles, new_folder, read_adapter
from .fit import fitted
from .plain_lora import plain_lora, write_plain_lora

MTP_FILE = "mtp.safetensors"
FORMAT_VERSION = 1
_TABLE, _SAMPLER = "base_model.lora_mask_embeddings.weight", "base_model.lora_sampler_heads.default."


def export_vllm(adapter: str, folder: str | Path, base: str | None = None, k: int | None = None) -> Path:
    """Writes an adapter as the folder that the integration with vLLM reads.

    Args:
        adapter (`str`): Hub id or folder of the adapter.
        folder (`str` or `Path`): The new folder, empty or missing.
        base (`str`, *optional*): Hub id or folder of the base, if it is not the one that the adapter names. Only its
            config is read.
        k (`int`, *optional*): How many masks to export; all by default.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: The adapter does not fit the base, has fewer than `k` masks, a recurrent sampler head, or more than
            a LoRA on linear layers.
        OSError: There is no such base, or the folder is not empty.
    """
    files = read_adapter(adapter)
    config = files.config
    masks = config.k if k is None else k
    if not 1 <= masks <= config.k:
        raise ValueError(f"`k` must be between 1 and {config.k}, the number of masks of {adapter}, but got {k}.")
    if config.sampler and config.sampler_recurrent:
        raise ValueError(
            f"{adapter} has a recurrent sampler head (`sampler_recurrent=True`), which the vLLM integration does not "
            "support. Train an adapter without it."
        )
    model = fitted(files, base)
    lora, tensors = plain_lora(files, model), _mask_and_sampler_tensors(files, model, masks)
    with new_folder(folder) as draft:
        write_plain_lora(lora, model.active_peft_config.base_model_name_or_path, "vLLM", draft)
        save_file(tensors, draft / MTP_FILE, metadata=_metadata(model, masks))
    return Path(folder)


def _mask_and_sampler_tensors(files: AdapterFiles, model: PeftModel, k: int) -> dict[str, torch.Tensor]:
    """All of an adapter but its LoRA, by the names in `mtp.safetensors`."""
    if files.config.masks == "noise":
        masks = {"mask_ids": model.base_model.noise_tokens["default"].ids[:k].clone()}
    else:
        masks = {"mask_embeddings": files.weights[_TABLE][:k].clone()}
    head = {name: tensor for name, tensor in files.weights.items() if name.startswith(_SAMPLER)}
    return masks | {f"sampler.{name.removeprefix(_SAMPLER)}": tensor.contiguous() for name, tensor in head.items()}


def _metadata(model: PeftModel, k: int) -> dict[str, str]:
    config = model.active_peft_config
    names = ("masks", "sampler", "sampler_residual", "sampler_recurrent", "base_hidden_size", "base_vocab_size")
    return {
        "format_version": str(FORMAT_VERSION),
        "k": str(k),
        **{name: str(getattr(config, name)) for name in names},
        "base_model_name_or_path": config.base_model_name_or_path,
    }
