"""The names under which PEFT knows our adapters and our models."""

import enum


class ExtensionPeftType(str, enum.Enum):
    """Adapter types that this package adds to [`~peft.PeftType`], an enum that cannot be extended.

    Not `"LORA"`: PEFT would load such an adapter as a plain LoRA, ungated, without an error.
    """

    GATED_LORA = "GATED_LORA"


class ExtensionTaskType(str, enum.Enum):
    """Task types that this package adds to [`~peft.TaskType`]: PEFT chooses the class of a model by its task."""

    GATED_CAUSAL_LM = "GATED_CAUSAL_LM"
