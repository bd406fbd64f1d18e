"""The name under which PEFT knows our adapters."""

import enum


class ExtensionPeftType(str, enum.Enum):
    """Adapter types that this package adds to [`~peft.PeftType`], an enum that cannot be extended.

    Not `"LORA"`: PEFT would load such an adapter as a plain LoRA, ungated, without an error.
    """

    GATED_LORA = "GATED_LORA"
