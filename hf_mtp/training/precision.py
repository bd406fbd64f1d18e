"""Keeps the precision of an adapter that TRL would reduce. Knows nothing of losses or data."""

import torch
from peft import PeftModel

from ..model import GatedLoraModel


def trainable_weights(model) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The weights of an adapter before TRL gets the model; none if TRL is to make the adapter."""
    return {p: p.data for p in model.parameters() if p.requires_grad} if isinstance(model, PeftModel) else {}


def restore_precision(tuner: GatedLoraModel, before: dict[torch.nn.Parameter, torch.Tensor]) -> None:
    """Undoes TRL's cast of an adapter to bfloat16, which it does if the base is quantized by bitsandbytes.

    In bfloat16 a weight near 1 changes in steps of 0.4 to 0.8 percent, and smaller updates are lost. So the gains of
    the sampler head would never change. Without a quantized base, PEFT keeps adapters in float32.

    Args:
        tuner ([`GatedLoraModel`]): The model that TRL returned.
        before (`dict`): From [`trainable_weights`], for an adapter that is older.
    """
    base = tuner.model
    is_quantized = getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False)
    for parameter in tuner.trainable_parameters():
        weight = before.get(parameter, parameter.data.float() if is_quantized else parameter.data)
        if weight.dtype != parameter.dtype:
            parameter.data = weight.to(parameter.device)
