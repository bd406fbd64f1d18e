"""Makes PEFT know the adapter type, so that its own functions make, save, load and share gated adapters."""

from peft import PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from .config import GatedLoraConfig
from .hub import push_to_hub
from .peft_type import ExtensionPeftType
from .tuner import GatedLoraModel


def register() -> None:
    """Adds GATED_LORA to PEFT's tables, and our card to what PEFT uploads. Safe to call twice.

    `peft.utils.register_peft_method` takes members of PEFT's own enum only, which no other package can add to.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[ExtensionPeftType.GATED_LORA] = GatedLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[ExtensionPeftType.GATED_LORA] = GatedLoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[ExtensionPeftType.GATED_LORA] = "lora_"
    PeftModel.push_to_hub = push_to_hub
