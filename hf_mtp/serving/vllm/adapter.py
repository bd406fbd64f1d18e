"""The folder that `hf-mtp export --to vllm` writes: a plain LoRA for vLLM's loader, and what goes beside it.

Knows files only, and nothing of vLLM.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ...adapter.sampler import SamplerHead

FILE, LORA, CONFIG = "mtp.safetensors", "adapter_model.safetensors", "adapter_config.json"
EMBEDDINGS, IDS, SAMPLER = "mask_embeddings", "mask_ids", "sampler."  # tensors of FILE
FORMAT = "1"
AGAIN = "Make the folder with hf-mtp export ADAPTER FOLDER --to vllm."


@dataclass(frozen=True)
class ExportedAdapter:
    """What the files of an exported adapter say.

    Args:
        folder (`str`): The folder.
        base (`str`): Hub id or folder of the base model.
        k (`int`), rank (`int`): Its masks, and the rank of its LoRA.
        modules (`list[str]`): Names of the linear layers that have a LoRA.
        sampler (`bool`), residual (`bool`): Whether it has a sampler head, and of which kind.
        hidden_size, vocab_size (`int`): Of the base.
    """

    folder: str
    base: str
    k: int
    rank: int
    modules: list[str]
    sampler: bool
    residual: bool
    hidden_size: int
    vocab_size: int

    @classmethod
    def read(cls, folder: str) -> "ExportedAdapter":
        """Reads the settings, not the weights.

        Args:
            folder (`str`): The folder.

        Raises:
            ValueError: The folder is no exported adapter, or its kind of adapter cannot be served.
        """
        config = _config(Path(folder))
        with _opened(Path(folder) / FILE) as file:
            meta, tensors = file.metadata() or {}, set(file.keys())
        if meta.get("format_version") != FORMAT or not tensors & {EMBEDDINGS, IDS}:
            raise ValueError(
                f"{folder}/{FILE} has format version {meta.get('format_version')!r} and tensors {sorted(tensors)}. "
                f"This release of hf_mtp reads version {FORMAT}, with masks. {AGAIN}"
            )
        if meta["sampler_recurrent"] == "True":
            raise ValueError(f"{folder} has a recurrent sampler head, which hf_mtp does not compute in vLLM.")
        with _opened(Path(folder) / LORA) as file:
            modules = sorted({name.split(".")[-3] for name in file.keys()})
        flags = [meta[name] == "True" for name in ("sampler", "sampler_residual")]
        sizes = [int(meta[name]) for name in ("base_hidden_size", "base_vocab_size")]
        return cls(folder, config["base_model_name_or_path"], int(meta["k"]), config["r"], modules, *flags, *sizes)

    def weights(self, device: torch.device) -> tuple[dict[str, torch.Tensor], SamplerHead | None]:
        """Reads the weights.

        Args:
            device (`torch.device`): Where they are needed.

        Returns:
            The masks: [`EMBEDDINGS`] of shape `(k, E)`, or [`IDS`] `(k,)` of the tokens that stand in their place. And
            the sampler head, if any.
        """
        with _opened(Path(self.folder) / FILE, str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        masks = {name: tensor for name, tensor in tensors.items() if not name.startswith(SAMPLER)}
        if not self.sampler:
            return masks, None
        own = {name.removeprefix(SAMPLER): tensors[name] for name in tensors.keys() - masks.keys()}
        mix = own["blocks.0.weight"]
        head = SamplerHead(mix.shape[1] - self.hidden_size, self.hidden_size, self.residual).to(device, mix.dtype)
        head.load_state_dict(own)
        return masks, head.eval().requires_grad_(False)


def _config(folder: Path) -> dict:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {CONFIG}. {AGAIN}") from error
    if config["peft_type"] != "LORA":
        raise ValueError(f"{folder} is an adapter of type {config['peft_type']}, but vLLM reads LORA. {AGAIN}")
    if config.get("use_dora"):
        raise ValueError(f"{folder} uses DoRA, which vLLM does not compute. Train an adapter with use_dora=False.")
    return config


def _opened(path: Path, device: str = "cpu") -> safe_open:
    try:
        return safe_open(str(path), "pt", device)
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or broken ({error}). {AGAIN}") from error
