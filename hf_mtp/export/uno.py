"""Uno's layout (Sahoo et al., arXiv 2609.04010): a plain LoRA that acts on noise tokens, without a sampler head.

Its engine and SGLang read it from `adapter_config.json` and `adapter_model.safetensors`. The number of noise tokens is
a setting of the engine and not of the file.
"""

import dataclasses
import re
from pathlib import Path

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors.torch import save_file
from transformers.utils import find_adapter_config_file

from ..adapter.access import refuse_without_access
from ..adapter.card import write_model_card
from ..adapter.config import GatedLoraConfig
from ..adapter.loading import read_config, refuse_unsafe_file, refuse_without_weights
from ..adapter.peft_type import ExtensionPeftType
from .files import AdapterFiles, new_folder, read_adapter
from .fit import fitted
from .plain_lora import plain_lora, write_plain_lora
from .vllm import MTP_FILE

# The layers that Uno's own engine knows.
_LAYERS = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
_SUBFOLDERS = ("", "adapter")  # where a repository has the adapter; s-sahoo/uno-qwen3-8B has its base at the root
# Said of the file rather than of the LoRA, or ours to say.
_LEFT_OUT = {"peft_type", "task_type", "auto_mapping", "peft_version", "runtime_config"}


def export_uno(adapter: str, folder: str | Path, base: str | None = None) -> Path:
    """Writes an adapter in Uno's layout.

    Args:
        adapter (`str`): Hub id or folder of an adapter with `masks="noise"` and `sampler=False`.
        folder (`str` or `Path`): The new folder, empty or missing.
        base (`str`, *optional*): Hub id or folder of the base, if it is not the one that the adapter names. Only its
            config is read.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: The adapter does not fit the base, or holds what the layout cannot: mask embeddings, a sampler
            head, more than a LoRA, or a LoRA on layers that Uno does not know.
        OSError: There is no such base, or the folder is not empty.
    """
    files = read_adapter(adapter)
    _refuse_more_than_noise(files)
    model = fitted(files, base)
    lora = plain_lora(files, model)
    others = [name for name in lora.weights if not _LAYERS.fullmatch(name)]
    if others:
        raise ValueError(
            f"{adapter} has a LoRA on {len(others)} layer(s) that Uno's format does not support, such as "
            f"{others[0]!r}. It supports model.layers.N.self_attn.{{q,k,v,o}}_proj and "
            "model.layers.N.mlp.{gate,up,down}_proj: train an adapter with these `target_modules`, on a base that has "
            "them."
        )
    with new_folder(folder) as draft:
        write_plain_lora(lora, model.active_peft_config.base_model_name_or_path, "Uno and SGLang", draft)
    return Path(folder)


def _refuse_more_than_noise(files: AdapterFiles) -> None:
    config = files.config
    has = {
        "mask embeddings (`masks='learned'`)": config.masks != "noise",
        "a sampler head (`sampler=True`)": config.sampler,
    }
    if any(has.values()):
        raise ValueError(
            f"{files.name} has {' and '.join(what for what, it_has in has.items() if it_has)}, but Uno's format "
            "contains only a LoRA, which would draft badly without them. Train an adapter with "
            "GatedLoraConfig(masks='noise', sampler=False)."
        )


def import_uno(adapter: str, folder: str | Path, base: str | None = None, k: int = 8) -> Path:
    """Converts a Uno adapter into an adapter of this package, with `masks="noise"` and `sampler=False`.

    Args:
        adapter (`str`): Hub id or folder of Uno's adapter, or of a repository that has it in `adapter/`.
        folder (`str` or `Path`): The new folder, empty or missing.
        base (`str`, *optional*): Hub id or folder of the base, if it is not the one that the adapter names. Only its
            config is read.
        k (`int`, *optional*, defaults to 8): Maximum number of noise tokens per block. Uno's files do not contain it.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: There is no such adapter, it is not a Uno adapter, its file is a pickle, or it does not fit the
            base.
        OSError: There is no such base, or the folder is not empty.
    """
    refuse_without_access(adapter)
    found = {inside: find_adapter_config_file(adapter, subfolder=inside) for inside in _SUBFOLDERS}
    inside = next((inside for inside, path in found.items() if path), None)
    if inside is None:
        raise ValueError(
            f"{adapter} is not an adapter: it has no adapter_config.json, neither at its root nor in `adapter/`. Pass "
            "the Hub id or folder of a Uno adapter."
        )
    subfolder = inside or None
    refuse_unsafe_file(adapter, subfolder)
    refuse_without_weights(adapter, subfolder)
    if Path(adapter, MTP_FILE).is_file():
        raise ValueError(
            f"{adapter} is no Uno adapter, but an export for vLLM: {MTP_FILE} holds its masks and sampler head. Use "
            "the adapter that it was made from."
        )
    config = _config_of_uno(adapter, read_config(found[inside]), k)
    if base is not None:
        config.base_model_name_or_path, config.revision = base, None
    files = AdapterFiles(adapter, config, load_peft_weights(adapter, device="cpu", subfolder=subfolder))
    config = fitted(files, base).active_peft_config
    config.inference_mode = True
    with new_folder(folder) as draft:
        config.save_pretrained(str(draft))
        save_file(files.weights, draft / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        write_model_card(config, draft)
    return Path(folder)


def _config_of_uno(adapter: str, fields: dict, k: int) -> GatedLoraConfig:
    """Our config for the fields of Uno's, which are those of a plain [`~peft.LoraConfig`]."""
    if fields.get("peft_type") == ExtensionPeftType.GATED_LORA.value:
        raise ValueError(f"{adapter} is already an adapter of hf_mtp. Load it directly, or export it with `--to uno`.")
    if fields.get("peft_type") != "LORA":
        raise ValueError(
            f"{adapter} is an adapter of type {fields.get('peft_type')!r}, but Uno adapters have type 'LORA'."
        )
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    unknown = sorted(name for name, value in fields.items() if name not in known and value)
    if unknown:
        raise ValueError(
            f"The adapter_config.json of {adapter} has fields that the installed PEFT does not know: "
            f"{', '.join(unknown)}. They may change what the LoRA computes. Update PEFT, or remove them from the file."
        )
    return GatedLoraConfig(
        masks="noise",
        sampler=False,
        k=k,
        **{name: value for name, value in fields.items() if name in known - _LEFT_OUT and value is not None},
    )
