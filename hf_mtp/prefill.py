"""Prompts of more than text: the base reads them itself, as in plain decoding, all but the last token.

Images and sounds beside the text, and positions that the caller chose, are the model's own business. What is left to
the decode loop is one token of text behind a cache.
"""

import torch
from transformers import PreTrainedModel

from .cache import cache_name


def read_by_base(model: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict, read: int) -> None:
    """Reads all tokens of a prompt but the last into the cache that `generate` made for it.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        input_ids (`torch.LongTensor` of shape `(B, T)`): The prompt.
        model_kwargs (`dict`): What `generate` prepared, the cache included.
        read (`int`): Tokens that the cache holds already.

    Raises:
        NotImplementedError: The prompt ends within an image, or the model keeps something else than tokens in its
            cache, as cross-attention does.
    """
    _refuse_end_within_media(model, input_ids, model_kwargs)
    name, length = cache_name(model_kwargs), input_ids.shape[1]
    shorter = {
        key: value[..., :-1] if _has_an_entry_per_token(key, value, input_ids) else value
        for key, value in model_kwargs.items()
    }
    inputs = model.prepare_inputs_for_generation(
        input_ids[:, :-1], next_sequence_length=length - 1 - read, is_first_iteration=True, **shorter
    )
    with torch.no_grad():
        model(**inputs, return_dict=True)
    if any(layer.is_initialized and layer.get_seq_length() != length - 1 for layer in model_kwargs[name].layers):
        raise NotImplementedError(
            f"{type(model).__name__} keeps something else than the prompt's tokens in its cache (cross-attention to "
            "an image, say), which `mtp=True` cannot go on from. Decode with mtp=False."
        )


def _has_an_entry_per_token(name: str, value, input_ids: torch.LongTensor) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    by_row = value.shape == input_ids.shape and not value.is_floating_point()
    return by_row or (name == "position_ids" and value.shape[-1] == input_ids.shape[1])


def _refuse_end_within_media(model: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict) -> None:
    config = model.config
    media = {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video", "audio")} - {None}
    kinds = [model_kwargs[name][:, -1] for name in ("token_type_ids", "mm_token_type_ids") if name in model_kwargs]
    if any((input_ids[:, -1] == token).any() for token in media) or any(kind.any() for kind in kinds):
        raise NotImplementedError(
            "The last token of the prompt is no text, but `mtp=True` goes on from text. End the prompt with the text "
            "that introduces the answer, as the chat template of the processor does (add_generation_prompt=True)."
        )
