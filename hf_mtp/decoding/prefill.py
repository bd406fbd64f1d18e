"""Prompts of more than text: the base reads them itself, as in plain decoding, all but the last token.

Images and sounds beside the text, and positions that the caller chose, are the model's own business. What is left to
the decode loop is one token of text behind a cache, and what the model reads beside every token from there on.
"""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ..base.caches import CACHE_NAMES, cache_name, copied, tokens_by_layer
from ..passes.speculation_mode import are_close

# Arguments of a model's forward pass that the decode loop makes itself.
OWN_ARGUMENTS = {
    "attention_mask",
    "position_ids",
    *CACHE_NAMES,
    "inputs_embeds",
    "use_cache",
    "logits_to_keep",
    "cache_position",
    "output_hidden_states",
    "output_attentions",
}


@dataclass(frozen=True)
class ExtraInputs:
    """What a model goes on to see beside the text.

    Args:
        layers (`list[int]`): Layers whose keys and values are of an image, say, and stay as they are.
        inputs (`dict[str, torch.Tensor]` of shapes `(B, 1, ...)`): What it is given with each token.
    """

    layers: list[int] = field(default_factory=list)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)


@torch.no_grad()
def read_by_base(model: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict, read: int) -> ExtraInputs:
    """Reads all tokens of a prompt but the last into the cache that `generate` made for it.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        input_ids (`torch.LongTensor` of shape `(B, T)`): The prompt.
        model_kwargs (`dict`): What `generate` prepared, the cache included.
        read (`int`): Tokens that the cache holds already.

    Raises:
        NotImplementedError: The prompt ends within an image, or the model is given more with each token than what the
            decode loop can pass on.
    """
    _refuse_end_within_media(model, input_ids, model_kwargs)
    length = input_ids.shape[1]
    shorter = {
        key: _without_the_last_token(value, input_ids, dim=-1 if key == "position_ids" else 1)
        for key, value in model_kwargs.items()
    }
    inputs = model.prepare_inputs_for_generation(
        input_ids[:, :-1], next_sequence_length=length - 1 - read, is_first_iteration=True, **shorter
    )
    model(**inputs, return_dict=True)
    return _inputs_of_next_token(model, input_ids, model_kwargs)


def _inputs_of_next_token(model: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict) -> ExtraInputs:
    """Found out by reading a token as plain decoding does, and as the decode loop will, on copies of the cache."""
    name = cache_name(model_kwargs)
    inputs = model.prepare_inputs_for_generation(
        input_ids, next_sequence_length=1, is_first_iteration=False, **model_kwargs
    )
    held = inputs[name]

    def read(**inputs):
        return model(**{**inputs, name: copied(held)}, return_dict=True)

    outputs = read(**inputs)
    after = tokens_by_layer(outputs[name])
    layers = [index for index, tokens in tokens_by_layer(held).items() if tokens == after[index]]
    more = {
        key: value
        for key, value in inputs.items()
        if key not in OWN_ARGUMENTS | {"input_ids"} and isinstance(value, torch.Tensor | dict | list | tuple)
    }
    passed = {
        key: value
        for key, value in more.items()
        if layers and isinstance(value, torch.Tensor) and value.shape[:2] == (len(input_ids), 1)
    }
    if more.keys() != passed.keys():
        fewer = {key: value for key, value in inputs.items() if key not in more or key in passed}
        if not are_close(read(**fewer).logits[:, -1], outputs.logits[:, -1], model.dtype):
            raise NotImplementedError(
                f"{type(model).__name__} is given {', '.join(sorted(more.keys() - passed.keys()))} with every token, "
                "which `mtp=True` cannot do. Decode with mtp=False."
            )
    return ExtraInputs(layers, passed)


def _without_the_last_token(value, input_ids: torch.LongTensor, dim: int):
    """What has an entry per token, in this dimension, with one less; all else as it is."""
    if not isinstance(value, torch.Tensor) or value.is_floating_point():
        return value
    is_per_token = value.shape[-1] == input_ids.shape[1] if dim == -1 else value.shape[:2] == input_ids.shape
    return value.narrow(dim, 0, input_ids.shape[1] - 1) if is_per_token else value


def _refuse_end_within_media(model: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict) -> None:
    config = model.config
    media = {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video", "audio")} - {None}
    kinds = [model_kwargs[name][:, -1] for name in ("token_type_ids", "mm_token_type_ids") if name in model_kwargs]
    if any((input_ids[:, -1] == token).any() for token in media) or any(kind.any() for kind in kinds):
        raise NotImplementedError(
            "The last token of the prompt is no text, but `mtp=True` goes on from text. End the prompt with the text "
            "that introduces the answer, as the chat template of the processor does (add_generation_prompt=True)."
        )
