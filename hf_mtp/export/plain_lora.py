"""Writes the LoRA of a gated adapter as a plain LoRA, for engines that gate it themselves.

Shapes: r rank, D features of a layer's input, E of its output.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ..adapter.card import README
from .files import AdapterFiles

PREFIX = "base_model.model."  # of every layer in a file of PEFT's
# What engines do not compute, though PEFT does.
_VARIANTS = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "target_parameters", "arrow_config")

_README = """# {title}

The LoRA of a multi-token prediction adapter for `{base}`, exported by [hf_mtp](https://pypi.org/project/hf-mtp/) for
{engine}. It must act on mask tokens only. Loaded as an ordinary LoRA, by PEFT say, it acts on all tokens and changes
the text.
"""


@dataclass(frozen=True)
class PlainLora:
    """A LoRA with one rank and one scale.

    Args:
        r (`int`): The rank.
        lora_alpha (`float`): Numerator of the scale, `lora_alpha / r`.
        weights (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): A `(r, D)` and B `(E, r)` of each layer, by its name
            in the base.
        exclude_modules (`list[str]`): Names of the base's layers that have none, although others of their kind do.
    """

    r: int
    lora_alpha: float
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]
    exclude_modules: list[str]

    @property
    def target_modules(self) -> list[str]:
        """The last parts of the names of the layers."""
        return sorted({name.rpartition(".")[2] for name in self.weights})


def plain_lora(files: AdapterFiles, model: PeftModel) -> PlainLora:
    """An equivalent LoRA with a single rank and a single scale.

    If layers differ in scale, the scale is folded into B. If they differ in rank, smaller ones are padded with zeros.

    Args:
        files ([`AdapterFiles`]): The adapter.
        model ([`~peft.PeftModel`]): The model that it fits, from [`fitted`].

    Raises:
        ValueError: The adapter is more than a LoRA on linear layers.
    """
    config, layers = files.config, model.base_model.gated_layers()
    for name in _VARIANTS:
        if getattr(config, name, None):
            raise ValueError(
                f"{files.name} has `{name}={getattr(config, name)!r}`, which other engines do not support. Only "
                "plain LoRA on linear layers can be exported: train an adapter without this setting."
            )
    scales = {name: layer.scaling["default"] for name, layer in layers.items()}
    r = max(layer.r["default"] for layer in layers.values())
    kinds = {name.rpartition(".")[2] for name in layers}
    names = {name for name, _ in model.get_base_model().named_modules() if name.rpartition(".")[2] in kinds}
    without = sorted(names - layers.keys())
    is_uniform = len(set(scales.values())) == 1
    weights = {}
    for name, scale in scales.items():
        A_rD, B_Er = (files.weights[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        if not is_uniform:
            B_Er = B_Er * scale
        missing = r - len(A_rD)
        weights[name] = F.pad(A_rD, (0, 0, 0, missing)), F.pad(B_Er, (0, missing))
    if not (config.rank_pattern or config.alpha_pattern or config.use_rslora):
        return PlainLora(config.r, config.lora_alpha, weights, without)  # the very numbers
    return PlainLora(r, r * next(iter(scales.values())) if is_uniform else r, weights, without)


def write_plain_lora(lora: PlainLora, base: str, engine: str, folder: Path) -> None:
    """Writes a LoRA as PEFT does, with a README.

    Args:
        lora ([`PlainLora`]): The LoRA.
        base (`str`): Name of the base.
        engine (`str`): What it is for, in words.
        folder (`Path`): An empty folder.
    """
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.r,
        "revision": None,
        "target_modules": lora.target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    if lora.exclude_modules:
        config["exclude_modules"] = lora.exclude_modules
    tensors = {
        f"{PREFIX}{name}.lora_{part}.weight": weight.contiguous()
        for name, pair in lora.weights.items()
        for part, weight in zip("AB", pair, strict=True)
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    readme = _README.format(title=folder.name, base=base, engine=engine)
    (folder / README).write_text(readme, encoding="utf-8")
