"""Checks that an adapter's files fit a base, from the base's config alone."""

import copy

import torch
from peft import get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from ..adapter.hub import PeftModelForCausalLM
from ..adapter.loading import refuse_weights_unlike
from ..pretrained import takes_images
from .files import AdapterFiles


def fitted(files: AdapterFiles, base: str | None = None) -> PeftModelForCausalLM:
    """The upgraded model that the files belong to, without any weights.

    Args:
        files ([`AdapterFiles`]): The adapter.
        base (`str`, *optional*): Hub id or folder of its base, if it is not the one that the adapter names.

    Returns:
        [`~peft.PeftModel`] on the meta device, whose config has the sizes of the base.

    Raises:
        ValueError: The adapter names no base, its base has another size or tokenizer, or a tensor is missing, unknown,
            of another shape or not finite.
        OSError: There is no such base.
    """
    name, revision = (base, None) if base else (files.config.base_model_name_or_path, files.config.revision)
    if not name:
        raise ValueError(f"{files.name} does not name its base. Pass its Hub id or folder as `base` (`--base`).")
    model = PeftModelForCausalLM(without_weights(name, revision), copy.deepcopy(files.config), low_cpu_mem_usage=True)
    try:
        refuse_weights_unlike(files.weights, get_peft_model_state_dict(model, save_embedding_layers=False))
    except ValueError as error:
        raise ValueError(f"{files.name} does not fit {name}. {error}") from error
    model.active_peft_config.base_model_name_or_path = name
    return model


def without_weights(name: str, revision: str | None = None) -> PreTrainedModel:
    """A base model on the meta device.

    Args:
        name (`str`): Hub id or folder. Only its config is read.
        revision (`str`, *optional*): Its commit.

    Raises:
        OSError: There is no such model.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        kind = AutoModelForImageTextToText if takes_images(name, revision=revision) else AutoModelForCausalLM
    except OSError as error:
        raise OSError(
            f"The config of the base {name} cannot be read, so the adapter cannot be checked against it. Pass the "
            "Hub id or folder of the base as `base` (`--base`); no weights are needed."
        ) from error
    with torch.device("meta"):
        return kind.from_config(config)
