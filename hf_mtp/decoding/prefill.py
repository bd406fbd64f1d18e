"""Prompts of more than text: the base reads them itself, as in plain decoding, all but the last token.

Images and sounds beside the text, and positions that the caller chose, are the model's own business. What is left to
the decode loop is one token of text behind a cache, and what the model reads beside every token from there on.
"""

from dataclasses import dataclass, field, replace

import torch
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from ..base.caches import CACHE_NAMES, cache_name, copied, tokens_by_layer
from ..base.inspection import is_media, media_tokens
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
        states (`dict[str, tuple]`): Hidden states and attentions of what the base read, if they were asked for.
    """

    layers: list[int] = field(default_factory=list)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    states: dict[str, tuple] = field(default_factory=dict)


@torch.no_grad()
def read_by_base(
    model: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict, columns: int, read: int
) -> ExtraInputs:
    """Reads all tokens of a prompt but the last into the cache that `generate` made for it.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        input_ids (`torch.LongTensor` of shape `(B, T)`): The prompt.
        model_kwargs (`dict`): What `generate` prepared, the cache included.
        columns (`int`): Tokens of the prompt, those in the cache and embeddings included.
        read (`int`): Tokens that the cache holds already.

    Raises:
        NotImplementedError: The prompt ends within an image, or the model is given more with each token than what the
            decode loop can pass on.
    """
    _refuse_end_within_media(model, input_ids, model_kwargs)
    shorter = {key: _without_the_last_token(key, value, columns) for key, value in model_kwargs.items()}
    inputs = model.prepare_inputs_for_generation(
        input_ids[:, :-1], next_sequence_length=columns - 1 - read, is_first_iteration=True, **shorter
    )
    outputs = model(**inputs, return_dict=True)
    asked = [name for name in ("hidden_states", "attentions") if model_kwargs.get(f"output_{name}")]
    states = {name: outputs[name] for name in asked}
    return replace(_inputs_of_next_token(model, input_ids, model_kwargs), states=states)


@torch.no_grad()
def read_texts(model: PreTrainedModel, ids_BS: torch.LongTensor, prompt: int, model_kwargs: dict) -> Cache:
    """A cache of whole texts, as plain decoding would have filled it.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        ids_BS (`torch.LongTensor` of shape `(B, S)`): The texts.
        prompt (`int`): Tokens of the prompt among these.
        model_kwargs (`dict`): What `generate` prepared for the prompt, with an empty cache or none.
    """
    new_BN, inputs = ids_BS[:, prompt:], dict(model_kwargs)
    if new_BN.shape[1]:
        inputs = model._update_model_kwargs_for_generation(ModelOutput(), inputs, num_new_tokens=new_BN.shape[1])
    if inputs.get("inputs_embeds") is not None:
        new_embeds = model.get_input_embeddings()(new_BN)
        inputs["inputs_embeds"] = torch.cat([inputs["inputs_embeds"], new_embeds], dim=1)
    outputs = model(**model.prepare_inputs_for_generation(ids_BS, is_first_iteration=True, **inputs), return_dict=True)
    return outputs[cache_name(outputs)]


def _inputs_of_next_token(model: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict) -> ExtraInputs:
    """Found out by reading a token as plain decoding does, and as the decode loop will, on copies of the cache."""
    name = cache_name(model_kwargs)
    inputs = model.prepare_inputs_for_generation(
        input_ids,
        next_sequence_length=1,
        is_first_iteration=model_kwargs.get("inputs_embeds") is not None,
        **model_kwargs,
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
    per_token = {
        key: value
        for key, value in more.items()
        if isinstance(value, torch.Tensor) and value.shape[:2] == (len(input_ids), 1)
    }
    for passed in [per_token] if layers else [{}, per_token]:
        fewer = {key: value for key, value in inputs.items() if key not in more or key in passed}
        if more.keys() == passed.keys() or are_close(read(**fewer).logits[:, -1], outputs.logits[:, -1], model.dtype):
            return ExtraInputs(layers, passed)
    raise NotImplementedError(
        f"{type(model).__name__} is given {', '.join(sorted(more.keys() - per_token.keys()))} with every token, "
        "which `mtp=True` cannot do. Decode with mtp=False."
    )


def _without_the_last_token(name: str, value, columns: int):
    """What has an entry per token with one less; all else as it is."""
    if not isinstance(value, torch.Tensor) or (value.is_floating_point() and name != "inputs_embeds"):
        return value
    dim = -1 if name == "position_ids" else 1
    is_per_token = value.dim() > 1 and value.shape[dim] == columns
    return value.narrow(dim, 0, columns - 1) if is_per_token else value


def _refuse_end_within_media(model: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict) -> None:
    kinds = [model_kwargs[name][:, -1] for name in ("token_type_ids", "mm_token_type_ids") if name in model_kwargs]
    # Token types count where the model has media: GPT-2's are of another kind.
    has_media = bool(media_tokens(model.config)) and input_ids.shape[1] > 0
    if has_media and (is_media(model.config, input_ids[:, -1]).any() or any(kind.any() for kind in kinds)):
        raise NotImplementedError(
            "The last token of the prompt is no text, but `mtp=True` goes on from text. End the prompt with the text "
            "that introduces the answer, as the chat template of the processor does (add_generation_prompt=True)."
        )
