"""Inspects a base model: whether it can be upgraded, where it computes, which masks its attention accepts.

Knows the interfaces of transformers, and nothing of adapters or of single architectures.
"""

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..layout.attention import AttentionKind, additive, attention_kinds, in_blocks

SAMPLED_VALUES = 64  # of each weight, for a fingerprint
_ATTENTION_KINDS = {AttentionKind().name, "sliding_attention", "chunked_attention"}


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raises unless the model is a decoder-only causal language model.

    Raises:
        TypeError: It is not a transformers model, or it is compiled.
        ValueError: It is an encoder-decoder, attends to later tokens, or has no input or output embeddings.
    """
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "The base is compiled, so that an adapter cannot be added to its layers. Upgrade it first and compile the "
            "result: `torch.compile(get_peft_model(base, GatedLoraConfig(...)))`."
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"Multi-token prediction needs a transformers model, but got {type(model).__name__}. Load one with "
            "AutoModelForCausalLM.from_pretrained."
        )
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder model, but multi-token prediction needs a decoder-only causal language "
            "model."
        )
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise ValueError(
            f"{name} is not a causal language model: it does not generate text, or it has no output embeddings that "
            "turn hidden states into logits. Load it with AutoModelForCausalLM.from_pretrained."
        )
    if getattr(model.config, "is_decoder", None) is False and hasattr(model.config, "add_cross_attention"):
        raise ValueError(
            f"{name} attends to later tokens: its config says is_decoder=False, so it is an encoder. Load it with "
            "AutoModelForCausalLM.from_pretrained(..., is_decoder=True) if it was trained to predict next tokens."
        )


def refuse_attention_without_masks(model: PreTrainedModel) -> None:
    """Raises if the attention implementation in use accepts no 4-D attention mask.

    Raises:
        ValueError: It is flash attention.
    """
    if mask_form(model) is None:
        raise ValueError(
            f"The base model uses attn_implementation={model.config._attn_implementation!r}, which does not accept a "
            "4-D attention mask, but blocks of masks after several tokens need one. Call "
            "`model.set_attn_implementation('sdpa')`, or decode with mtp_strategy='linear'."
        )


def mask_form(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Callable | None:
    """The function that converts masks for the attention implementation in use; `None` if it accepts no mask.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        dtype (`torch.dtype`, *optional*): The dtype that attention computes in; the model's own if `None`.
    """
    implementation = model.config._attn_implementation or "eager"
    if "flash" in implementation:
        return None
    return in_blocks if "flex" in implementation else partial(additive, dtype=dtype or model.dtype)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a causal language model that returns the last hidden states.

    Raises:
        ValueError: The model has no such part.
    """
    for part in (model.get_decoder(), model.base_model, *model.children()):
        if isinstance(part, PreTrainedModel) and part is not model:
            return part
    raise ValueError(
        f"{type(model).__name__} has no decoder that is separate from its output layer, so the hidden states of "
        "masks cannot be read. Multi-token prediction needs a model with `get_decoder` and output embeddings, as in "
        "transformers."
    )


def has_more_tables(model: PreTrainedModel) -> bool:
    """Whether a model embeds token ids in more than one table, so that the input embeddings alone do not tell all."""
    known = model.get_input_embeddings()
    tables = (layer for layer in decoder_of(model).modules() if isinstance(layer, torch.nn.Embedding))
    return any(layer is not known and len(layer.weight) == weight_shape(known)[0] for layer in tables)


def refuse_without_weights(model: PreTrainedModel) -> None:
    """Raises if the model has no weights.

    Raises:
        ValueError: It is on the meta device, and no hook of accelerate loads its weights.
    """
    if input_device(model).type == "meta":
        raise ValueError(
            f"{type(model).__name__} is on the meta device, so it has no weights. Load it with "
            "AutoModelForCausalLM.from_pretrained, or give it weights with `to_empty` and `load_state_dict`."
        )


def input_device(model: PreTrainedModel) -> torch.device:
    """The device on which a model expects token ids. The adapter's own modules compute there, too."""
    return device_of(model.get_input_embeddings())


def device_of(layer: torch.nn.Module) -> torch.device:
    """The device on which a layer computes, even if accelerate keeps its weights elsewhere between calls."""
    waiting = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return layer.weight.device if waiting is None else torch.device(waiting)


def weight_shape(layer: torch.nn.Module) -> torch.Size:
    """Shape of a layer's whole weight. DeepSpeed ZeRO-3 empties the weight itself while it is not needed."""
    return getattr(layer.weight, "ds_shape", layer.weight.shape)


def unpack_for_gradients(model: torch.nn.Module) -> None:
    """Prepares 4-bit layers of bitsandbytes for training on a CPU.

    In evaluation, bitsandbytes packs their weights for a kernel that silently drops gradients. Unpacking is not
    exact: a layer that was packed computes with slightly different weights afterwards.
    """
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
            layer.state_dict()  # unpacks what was packed before


def is_media(config: PreTrainedConfig, input_ids: torch.LongTensor) -> torch.BoolTensor:
    """Which tokens are placeholders for an image, a video or a sound."""
    return torch.isin(input_ids, input_ids.new_tensor(media_tokens(config)))


def media_tokens(config: PreTrainedConfig) -> list[int]:
    """Ids of the placeholder tokens for images, videos and sounds."""
    tokens = (getattr(config, f"{kind}_token_id", None) for kind in ("image", "video", "audio"))
    return [token for token in tokens if token is not None]


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether the model declares a recurrent state. Unlike keys and values, such a state cannot be cropped."""
    kinds = {kind.name for kind in attention_kinds(model.config.get_text_config(decoder=True))}
    return bool(kinds - _ATTENTION_KINDS) or bool(getattr(model, "_is_stateful", False))


def evaluation_mode(model: torch.nn.Module) -> AbstractContextManager[None]:
    """Puts all modules in evaluation mode, and restores each module's mode on exit."""
    return _switched_off(model, "training")


def has_dropout(model: PreTrainedModel) -> bool:
    """Whether the base's config has a dropout above 0, which is on in training mode."""
    config = model.config.get_text_config(decoder=True).to_dict()
    return any(isinstance(value, float) and value > 0 for name, value in config.items() if "drop" in name)


def without_checkpointing(model: torch.nn.Module) -> AbstractContextManager[None]:
    """Turns gradient checkpointing off, and on again on exit."""
    return _switched_off(model, "gradient_checkpointing")


@contextmanager
def _switched_off(model: torch.nn.Module, attribute: str) -> Iterator[None]:
    modules = [module for module in model.modules() if getattr(module, attribute, False)]
    for module in modules:
        setattr(module, attribute, False)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, attribute, True)


def is_checkpointing(model: torch.nn.Module) -> bool:
    """Whether gradient checkpointing runs layers again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def auto_class(model: PreTrainedModel) -> str:
    """The name of the class of transformers that loads a model: not that of language models for many with images."""
    kinds = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    with_images, text_only = (type(model) is kind.get(type(model.config), None) for kind in kinds)
    return "AutoModelForImageTextToText" if with_images and not text_only else "AutoModelForCausalLM"


def base_name(model: PreTrainedModel) -> str:
    """The Hub id of a model, or the name of its folder without the path to it; the class of one made in memory."""
    name = model.name_or_path
    if not name:
        return type(model).__name__
    return Path(name).resolve().name if Path(name).is_dir() else name


def weights_fingerprint(weights: Iterable[torch.Tensor], without: Iterable[torch.Tensor] = ()) -> str:
    """16 hexadecimal digits that change if a model is trained further, or is another one of the same name.

    They are those of some values of each weight, so large models take no time.

    Args:
        weights (`Iterable[torch.Tensor]`): The weights. Those on the meta device do not count.
        without (`Iterable[torch.Tensor]`, *optional*): Some of them that do not count.
    """
    digest, left_out = hashlib.sha256(), {id(weight) for weight in without}
    for weight in weights:
        if weight.device.type != "meta" and id(weight) not in left_out:
            values = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED_VALUES)]
            digest.update(values.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def accepted_inputs(inputs: dict, names: Container[str]) -> dict:
    """The inputs, by name, that a model's `forward` with arguments of these `names` accepts."""
    return {name: value for name, value in inputs.items() if name in names}
