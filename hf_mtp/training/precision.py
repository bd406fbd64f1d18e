"""Keeps the precision of an adapter that TRL and transformers would reduce. Knows nothing of losses or data."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from transformers import Trainer

from ..model import GatedLoraModel


def trainable_weights(model) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The weights of an adapter before TRL gets the model; none if TRL is to make the adapter."""
    return {p: p.data for p in model.parameters() if p.requires_grad} if isinstance(model, PeftModel) else {}


def restore_precision(trainer: Trainer, tuner: GatedLoraModel, before: dict[torch.nn.Parameter, torch.Tensor]) -> None:
    """Undoes TRL's cast of an adapter to bfloat16, which it does if the base is quantized by bitsandbytes.

    In bfloat16 a weight near 1 changes in steps of 0.4 to 0.8 percent, and smaller updates are lost. So at the default
    learning rate the gains of the sampler head would never change. PEFT keeps adapters of other bases in float32.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer. DeepSpeed and FSDP need one dtype, and train a wider copy.
        tuner ([`GatedLoraModel`]): Its model.
        before (`dict`): From [`trainable_weights`], for an adapter that is older.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return
    base = tuner.model
    is_quantized = getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False)
    for parameter in tuner.trainable_parameters():
        weight = before.get(parameter, parameter.data.float() if is_quantized else parameter.data)
        if weight.dtype != parameter.dtype:
            parameter.data = weight.to(parameter.device)


@contextmanager
def precision_kept(trainer: Trainer) -> Iterator[None]:
    """Restores the adapter after an evaluation for which `bf16_full_eval` or `fp16_full_eval` casts the model.

    The base remains in half precision. An adapter that did so would be trained and saved in it.
    """
    before = trainable_weights(trainer.model)
    yield
    for parameter, weight in before.items():
        if weight.dtype != parameter.dtype:
            parameter.data = weight.to(parameter.device)
