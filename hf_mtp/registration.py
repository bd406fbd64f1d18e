"""Makes PEFT know the adapter type, so that its own functions make, save, load and share gated adapters."""

from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from .adapter.config import GatedLoraConfig
from .adapter.hub import PeftModelForCausalLM
from .adapter.peft_type import ExtensionPeftType, ExtensionTaskType
from .model import GatedLoraModel


def register() -> None:
    """Adds our types to PEFT's tables. Safe to call twice.

    `peft.utils.register_peft_method` takes members of PEFT's own enum only, which no other package can add to.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[ExtensionPeftType.GATED_LORA] = GatedLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[ExtensionPeftType.GATED_LORA] = GatedLoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[ExtensionPeftType.GATED_LORA] = "lora_"
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING[ExtensionTaskType.GATED_CAUSAL_LM] = PeftModelForCausalLM
