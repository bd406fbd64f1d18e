"""Loads base models, adapters with their base, and tokenizers by Hub id or folder."""

from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME, find_adapter_config_file

from .adapter.access import refuse_without_access
from .adapter.loading import read_config
from .adapter.tuner import GatedLoraTuner


def load_model(
    name: str, dtype: str | torch.dtype = "auto", device: str | torch.device | None = None, **kwargs
) -> PreTrainedModel | PeftModel:
    """Loads a base model, or an adapter together with its base.

    Args:
        name (`str`): Hub id or folder.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Dtype of the weights; by default the dtype of
            the checkpoint.
        device (`str` or `torch.device`, *optional*): Device of the model. By default an accelerator, if there is one.

    kwargs: Further arguments of `from_pretrained`, such as `revision`.

    Raises:
        OSError: There is no such model, or you have no access to it.
        ValueError: There is no such dtype or device, the adapter does not fit its base, or its config is broken.
    """
    refuse_dtype(dtype)
    refuse_device(device)
    hub = {key: value for key, value in kwargs.items() if key in ("revision", "token", "cache_dir")}
    device = device or default_device()
    if not is_adapter(name, **hub):
        refuse_folder_of_checkpoints(name)
        kind = AutoModelForImageTextToText if takes_images(name, **kwargs) else AutoModelForCausalLM
        return kind.from_pretrained(name, dtype=dtype, **kwargs).to(device)
    adapter = PeftConfig.from_pretrained(name, **hub)
    base = _of_base(adapter, kwargs)
    if takes_images(adapter.base_model_name_or_path, **base):
        model = AutoModelForImageTextToText.from_pretrained(adapter.base_model_name_or_path, dtype=dtype, **base)
        return PeftModel.from_pretrained(model, name, **hub).to(device)
    return AutoPeftModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs).to(device)


def refuse_folder_of_checkpoints(name: str) -> None:
    """Raises an `OSError` for the output folder of a training that has checkpoints, but no model or adapter.

    Args:
        name (`str`): Hub id or folder.
    """
    folder = Path(name)
    newest = get_last_checkpoint(folder) if folder.is_dir() and not (folder / CONFIG_NAME).is_file() else None
    if newest is not None:
        raise OSError(
            f"{name} has only checkpoints of a training. Pass one of them, such as {newest}, or save the adapter with "
            "`trainer.save_model()`."
        )


def refuse_dtype(dtype: str | torch.dtype) -> None:
    """Raises a `ValueError` unless weights can be loaded in this dtype.

    Args:
        dtype (`str` or `torch.dtype`): A dtype or its name, or `"auto"`.
    """
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(
            f"The dtype must be 'auto' or one of torch's floating-point types, such as 'bfloat16', but got {dtype!r}."
        )


def refuse_device(device: str | torch.device | None) -> None:
    """Raises a `ValueError` unless this machine has the device.

    Args:
        device (`str` or `torch.device`, *optional*): A device or its name; `None` is always accepted.
    """
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch has a type of error for each way to have no device
        kind = default_device().type
        count = 0 if kind == "cpu" else getattr(torch, kind).device_count()
        here = ["cpu", *(f"{kind}:{index}" for index in range(count))]
        if str(device) in (kind, *here):  # it is there, but fails
            raise
        raise ValueError(
            f"The device must be one that this machine has ({', '.join(here)}), but got {str(device)!r}."
        ) from error


def load_upgraded(
    name: str, adapter: str | None = None, dtype: str | torch.dtype = "auto"
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Loads a base model with an adapter, in evaluation mode, and its tokenizer.

    Args:
        name (`str`): Hub id or folder of the base, or of the adapter if `adapter` is `None`.
        adapter (`str`, *optional*): Hub id or folder of the adapter.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Dtype of the base's weights.

    Raises:
        OSError: There is no such model or adapter.
        ValueError: The adapter does not fit its base, or there is none.
    """
    model, tokenizer = load_with_tokenizer(name, adapter, dtype)
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"{name} is a base model without an adapter. Pass the Hub id or folder of its adapter as well (--adapter)."
        )
    return model, tokenizer


def load_with_tokenizer(
    name: str, adapter: str | None = None, dtype: str | torch.dtype = "auto"
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Loads a base model, with or without an adapter, in evaluation mode, and its tokenizer.

    Args:
        name (`str`): Hub id or folder of a base or of an adapter.
        adapter (`str`, *optional*): Hub id or folder of the adapter, if `name` is a base.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Dtype of the base's weights.

    Raises:
        OSError: There is no such model or adapter.
        ValueError: The adapter does not fit its base, or is not one of hf_mtp.
    """
    model = load_model(name, dtype)
    tokenizer = load_tokenizer(name, model)
    if adapter is not None:
        if isinstance(model, PeftModel):
            raise ValueError(
                f"{name} is an adapter, not a base model. Pass its base as the model, or leave out {adapter}."
            )
        if not is_adapter(adapter):
            raise ValueError(
                f"{adapter} is not an adapter: it has no adapter_config.json. Pass the Hub id or folder of an adapter."
            )
        model = PeftModel.from_pretrained(model, adapter)
    if isinstance(model, PeftModel):
        refuse_other_adapter(model, adapter or name)
    return model.eval(), tokenizer


def is_upgraded(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model has an adapter of hf_mtp.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model.
    """
    return isinstance(model.base_model, GatedLoraTuner)


def refuse_other_adapter(model: PeftModel, name: str) -> None:
    """Raises a `ValueError` unless the adapter is one of hf_mtp.

    Args:
        model ([`~peft.PeftModel`]): A model with an adapter.
        name (`str`): The Hub id or folder of the adapter, for the error.
    """
    if not is_upgraded(model):
        kind = model.peft_config[model.active_adapter].peft_type
        raise ValueError(
            f"{name} is an adapter of type {str(getattr(kind, 'value', kind))!r}, not one of hf_mtp ('GATED_LORA'), "
            "so it cannot predict several tokens. Pass an adapter that was trained with hf_mtp."
        )


def load_tokenizer(name: str, model: PreTrainedModel | PeftModel | None = None, **kwargs) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model, or of the base of an adapter.

    Args:
        name (`str`): Hub id or folder of the model or adapter.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*): The model, if it was loaded from
            there. Then the adapter's config is not read again.
        kwargs: `revision`, `token` and `cache_dir` of `from_pretrained`.

    Raises:
        OSError: There is no such model or tokenizer, or you have no access to it.
    """
    if isinstance(model, PeftModel):
        return AutoTokenizer.from_pretrained(model.name_or_path, **_of_base(model.active_peft_config, kwargs))
    if model is None and is_adapter(name, **kwargs):
        config = PeftConfig.from_pretrained(name, **kwargs)
        return AutoTokenizer.from_pretrained(config.base_model_name_or_path, **_of_base(config, kwargs))
    return AutoTokenizer.from_pretrained(name, **kwargs)


def load_processor(name: str, **kwargs) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Loads what prepares the inputs of an adapter's base: its processor if it reads images, else its tokenizer.

    Args:
        name (`str`): Hub id or folder of the adapter.
        kwargs: `revision`, `token` and `cache_dir` of `from_pretrained`.
    """
    config = PeftConfig.from_pretrained(name, **kwargs)
    base, hub = config.base_model_name_or_path, _of_base(config, kwargs)
    return AutoProcessor.from_pretrained(base, **hub) if takes_images(base, **hub) else load_tokenizer(name, **kwargs)


def _of_base(adapter: PeftConfig, hub: dict) -> dict:
    """Arguments of `from_pretrained` for the base of an adapter, which may pin a revision of its base."""
    return {**hub, "revision": adapter.revision or "main"}


def takes_images(name: str, **kwargs) -> bool:
    """Whether a base model reads images, by the class that its config names.

    Args:
        name (`str`): Hub id or folder of the base.
        kwargs: Arguments of `from_pretrained`.
    """
    config = AutoConfig.from_pretrained(name, **kwargs)
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    return kind is not None and kind.__name__ in (config.architectures or ())


def is_adapter(name: str, **kwargs) -> bool:
    """Whether a Hub id or folder holds an adapter.

    Args:
        name (`str`): Hub id or folder.
        kwargs: `revision`, `token` and `cache_dir` of the Hub.

    Raises:
        OSError: The repository is gated, private or missing.
        ValueError: The adapter's config is not valid JSON.
    """
    refuse_without_access(name, **kwargs)
    file = find_adapter_config_file(name, **kwargs)
    if file is None:
        return False
    read_config(file)  # PEFT's own error would not name the file
    return True


def default_device() -> torch.device:
    """An accelerator if there is one, else the CPU."""
    accelerator = getattr(torch, "accelerator", torch.cuda)
    if not accelerator.is_available():
        return torch.device("cpu")
    return torch.device("cuda") if accelerator is torch.cuda else accelerator.current_accelerator()
