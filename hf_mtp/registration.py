"""Registers the adapter type with PEFT, so that PEFT's own functions create, save, load and share gated adapters."""

from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .adapter.config import GatedLoraConfig
from .adapter.hub import PeftModelForCausalLM
from .adapter.peft_type import ExtensionPeftType, ExtensionTaskType
from .model import GatedLoraModel


def register() -> None:
    """Adds our types to PEFT's tables. It is safe to call this twice."""
    # `peft.utils.register_peft_method` accepts only members of PEFT's own enum, which cannot be extended.
    PEFT_TYPE_TO_CONFIG_MAPPING[ExtensionPeftType.GATED_LORA] = GatedLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[ExtensionPeftType.GATED_LORA] = GatedLoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[ExtensionPeftType.GATED_LORA] = "lora_"
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING[ExtensionTaskType.GATED_CAUSAL_LM] = PeftModelForCausalLM
