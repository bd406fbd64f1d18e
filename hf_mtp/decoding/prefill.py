"""Prefill of multimodal prompts: the base processes all but the last token itself, as in plain decoding.

Only the base can process images, sounds and position ids of the caller. The decode loop then continues from one token
of text and a cache, and passes on the extra inputs that the model needs with every token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from ..base.caches import CACHE_NAMES, cache_name, copied, tokens_by_layer
from ..base.inspection import is_media, media_tokens
from ..cache.protocol import DecodingCache
from ..layout.blocks import decoding_layout
from ..layout.mask_plan import no_masks
from ..passes.decoding_pass import DecodingPass
from ..passes.speculation_mode import are_close

# Arguments of a model's forward pass that the decode loop sets itself.
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
    """What a model uses besides the text after prefill.

    Args:
        layers (`list[int]`): Layers of the cache that hold something other than text, such as an image, and do not
            change.
        inputs (`dict[str, torch.Tensor]` of shapes `(B, 1, ...)`): Inputs of the model with each token.
        states (`dict[str, tuple]`): Hidden states and attentions of the tokens that the base read, if requested.
        is_in_use (`bool`): Whether the base read the prompt, all but its last token.
    """

    layers: list[int] = field(default_factory=list)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    states: dict[str, tuple] = field(default_factory=dict)
    is_in_use: bool = False


@torch.no_grad()
def read_by_base(
    model: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict, columns: int, read: int
) -> ExtraInputs:
    """Reads all tokens of a prompt but the last into the cache that `generate` created for it.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        input_ids (`torch.LongTensor` of shape `(B, T)`): The prompt.
        model_kwargs (`dict`): The arguments that `generate` prepared, the cache included.
        columns (`int`): Tokens of the prompt, including those in the cache and those given as embeddings.
        read (`int`): Tokens that the cache holds already.

    Raises:
        NotImplementedError: The prompt ends within an image, or the model needs inputs with each token that the decode
            loop cannot pass on.
    """
    _refuse_end_within_media(model, input_ids, model_kwargs)
    shorter = {key: _without_the_last_token(key, value, columns) for key, value in model_kwargs.items()}
    inputs = model.prepare_inputs_for_generation(
        input_ids[:, :-1], next_sequence_length=columns - 1 - read, is_first_iteration=True, **shorter
    )
    outputs = model(**inputs, return_dict=True)
    asked = [name for name in ("hidden_states", "attentions") if model_kwargs.get(f"output_{name}")]
    states = {name: outputs[name] for name in asked}
    return replace(_inputs_of_next_token(model, input_ids, model_kwargs), states=states, is_in_use=True)


def read_in_chunks(
    forward: DecodingPass, unread_BT: torch.Tensor, cache: DecodingCache, chunk: int | None
) -> torch.Tensor:
    """Reads a prompt in chunks, as `prefill_chunk_size` asks for, but for the last one.

    Args:
        forward ([`DecodingPass`]): The model's forward pass.
        unread_BT (`torch.Tensor`): The tokens: ids of shape `(B, T)`, or embeddings of shape `(B, T, E)`.
        cache ([`DecodingCache`]): The tokens before these. It gets those that are read.
        chunk (`int`, *optional*): Tokens of each chunk; all if `None`.

    Returns:
        The last chunk, `(B, t)` or `(B, t, E)`.
    """
    *first, last = unread_BT.split(chunk or unread_BT.shape[1], dim=1)
    for chunk_Bt in first:
        rows, size = chunk_Bt.shape[:2]
        layout = decoding_layout(cache.rows.next_places(size), no_masks(rows, 1, 1, chunk_Bt.device))
        forward(chunk_Bt, layout, cache, logits_rows=1)
        cache.keep([size] * rows)
    return last


@torch.no_grad()
def read_texts(model: PreTrainedModel, ids_BS: torch.LongTensor, prompt: int, model_kwargs: dict) -> Cache:
    """A cache of whole texts, as plain decoding would have filled it.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        ids_BS (`torch.LongTensor` of shape `(B, S)`): The texts.
        prompt (`int`): Tokens of the prompt in each text.
        model_kwargs (`dict`): The arguments that `generate` prepared for the prompt, with an empty cache or none.
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
    """Finds the extra inputs by reading a token as plain decoding does, and as the decode loop will."""
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
    _refuse_other_positions(model, model_kwargs, inputs, outputs.logits, read)
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
        f"{type(model).__name__} needs {', '.join(sorted(more.keys() - per_token.keys()))} with every token, which "
        "`mtp=True` does not support. Decode with mtp=False."
    )


def _refuse_other_positions(
    model: PreTrainedModel, model_kwargs: dict, inputs: dict, logits_B1V: torch.Tensor, read: Callable
) -> None:
    """Refuses models that drop `position_ids` and count neither as `generate` does nor by columns."""
    given = model_kwargs.get("position_ids")
    if given is None or "position_ids" not in inputs or inputs["position_ids"] is not None:
        return
    explicit = read(**{**inputs, "position_ids": given[..., -1:]})
    if not are_close(explicit.logits[:, -1], logits_B1V[:, -1], model.dtype):
        raise NotImplementedError(
            f"{type(model).__name__} drops `position_ids` and counts positions by itself, in a way that `mtp=True` "
            "does not support for this prompt. Pass one prompt at a time, without padding, or decode with mtp=False."
        )


def _without_the_last_token(name: str, value, columns: int):
    """Drops the last entry of a value with one entry per token; any other value is unchanged."""
    if not isinstance(value, torch.Tensor) or (value.is_floating_point() and name != "inputs_embeds"):
        return value
    dim = -1 if name == "position_ids" else 1
    is_per_token = value.dim() > 1 and value.shape[dim] == columns
    return value.narrow(dim, 0, columns - 1) if is_per_token else value


def _refuse_end_within_media(model: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict) -> None:
    kinds = [model_kwargs[name][:, -1] for name in ("token_type_ids", "mm_token_type_ids") if name in model_kwargs]
    # Token types mark media only in models that have media; those of GPT-2 mean something else.
    has_media = bool(media_tokens(model.config)) and input_ids.shape[1] > 0
    if has_media and (is_media(model.config, input_ids[:, -1]).any() or any(kind.any() for kind in kinds)):
        raise NotImplementedError(
            "The last token of the prompt is not text, but `mtp=True` needs a prompt that ends with text. Use the "
            "processor's chat template with add_generation_prompt=True, which adds the text before the answer."
        )
