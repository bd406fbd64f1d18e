"""Rejects requests that `generate(mtp=True)` cannot decode exactly, before anything is computed."""

import inspect

import torch
from transformers import Cache, GenerationConfig, PreTrainedConfig, PreTrainedModel, cache_utils
from transformers.generation.configuration_utils import GenerationMode

from ..base.caches import cache_name, is_dropped, tokens_by_layer
from ..base.inspection import is_checkpointing
from ..base.rope import rope_switches
from ..layout.attention import attention_kinds
from ..passes.speculation_mode import SpeculationMode, example_ids
from .prompt import Prompt

# transformers 5.20 has only the narrower class.
QuantizedLayer = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)

# Settings that select another generation mode, named in the error.
MODE_SETTINGS = (
    "num_beams",
    "num_beam_groups",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "assistant_early_exit",
    "use_mtp",
)


def refuse_ids(input_ids: torch.LongTensor, vocab_size: int) -> None:
    """Raises `ValueError` for token ids outside the base's vocabulary."""
    if input_ids.numel() and (input_ids.min() < 0 or input_ids.max() >= vocab_size):
        raise ValueError(
            f"The prompt has token ids from {input_ids.min().item()} to {input_ids.max().item()}, but the vocabulary "
            f"has ids 0 to {vocab_size - 1}. Was it tokenized with this model's own tokenizer?"
        )


def refuse_arguments(kwargs: dict) -> None:
    """Raises `ValueError` for arguments that `generate` would consume before the decode loop could check them."""
    if kwargs.get("custom_generate") is not None:
        raise ValueError("`custom_generate` and `mtp=True` cannot be combined. Pass only one of them.")
    if kwargs.get("assistant_model") is not None:
        raise ValueError("`assistant_model` and `mtp=True` cannot be combined. Pass only one of them.")
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            "`adapter_names` selects an adapter per row, but with `mtp=True` all masks belong to the active "
            "adapter. Select it with `set_adapter`, or leave out `mtp`."
        )
    if kwargs.get("token_healing"):
        raise ValueError(
            "`token_healing=True` needs the tokenizer, which transformers does not pass on to the decode loop of "
            "`mtp=True`. Leave it out, and pass healed ids: `model.heal_tokens(input_ids, tokenizer)`."
        )
    if kwargs.get("use_cache") is False:
        raise ValueError("`mtp=True` needs a cache to verify drafts, but got `use_cache=False`. Leave it out.")
    if kwargs.get("cache_implementation") == "paged":
        raise ValueError(
            "cache_implementation='paged' decodes with transformers' continuous batching, which does not call the "
            "decode loop of `mtp=True`. Leave it out, or serve the adapter with `hf-mtp serve`, which batches "
            "continuously."
        )


def refuse_quantized_cache(cache_implementation: str | None) -> None:
    """Raises `ValueError` for a quantized cache."""
    if cache_implementation == "quantized":
        raise ValueError(
            "cache_implementation='quantized' rounds keys and values in groups of tokens. The groups depend on how "
            "many tokens are decoded per pass, so `mtp=True` could not return the same output. Use 'dynamic', "
            "'static' or 'offloaded'."
        )


def refuse_generation_mode(config: GenerationConfig) -> None:
    """Raises `ValueError` for all modes except greedy decoding and sampling.

    Args:
        config ([`~transformers.GenerationConfig`]): The final configuration, as `generate` prepared it.
    """
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        values = {name: getattr(config, name, None) for name in MODE_SETTINGS}
        given = ", ".join(f"{name}={value!r}" for name, value in values.items() if value and str(value) != "1")
        raise ValueError(
            f"{given} selects {mode.value.replace('_', ' ')}, which does not decode one sequence token by token, so "
            "`mtp=True` could not return the same output. Leave out these settings, or `mtp=True`."
        )
    refuse_quantized_cache(config.cache_implementation)


def refuse_checkpointing(model: PreTrainedModel, mode: SpeculationMode) -> None:
    """Raises `ValueError` if the model is in training mode and does not fill its cache, as it checkpoints gradients.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        mode ([`SpeculationMode`]): How it computes several tokens per pass.
    """
    if mode is SpeculationMode.RECOMPUTE or not (model.training and is_checkpointing(model)):
        return
    held = model(input_ids=example_ids(model, 1, 1), use_cache=True).get(
        cache_name(inspect.signature(model.forward).parameters)
    )
    # A recurrent layer does not count tokens. It fills its cache, or there is none.
    if held is None or (mode is not SpeculationMode.CHAIN_ON_COPY and not tokens_by_layer(held)):
        raise ValueError(
            f"{type(model).__name__} is in training mode with gradient checkpointing, and then does not fill the "
            "cache that `generate` continues from. Call `model.eval()` before `generate`, and `model.train()` "
            "afterwards."
        )


def refuse_cache(cache: Cache | None, columns: int) -> None:
    """Raises `ValueError` if the user's cache is quantized, or has a fixed size that cannot hold the output.

    Args:
        cache ([`~transformers.Cache`], *optional*): The cache that was passed to `generate`.
        columns (`int`): The most tokens that it must hold in the end.
    """
    for layer in cache.layers if getattr(cache, "_is_user_defined", False) else ():
        if isinstance(layer, QuantizedLayer):
            refuse_quantized_cache("quantized")
        size = layer.get_max_length()
        if size != -1 and not layer.is_sliding and size < columns:
            raise ValueError(
                f"The cache that was passed has space for {size} tokens, but the prompt and the new tokens need up "
                f"to {columns}. Create it with max_cache_len={columns}, or lower `max_new_tokens`."
            )


def refuse_rope_switches(config: PreTrainedConfig, columns: int) -> None:
    """Raises `NotImplementedError` if a pass of fixed shape could cross a length at which rotary embeddings change.

    Args:
        config ([`~transformers.PreTrainedConfig`]): The model's config.
        columns (`int`): The most tokens that the text may have in the end.
    """
    for length in rope_switches(config):
        if columns >= length:
            raise NotImplementedError(
                f"This model's rotary embeddings change at {length} tokens, and the sequence may reach {columns}, so "
                "passes of a fixed shape would not be exact. Leave out `cache_implementation`, or lower "
                "`max_new_tokens`."
            )


def refuse_dropped_cache(model: PreTrainedModel, prompt: Prompt, ids: int, columns: int) -> None:
    """Raises `NotImplementedError` if plain decoding would drop a cache that the decode loop cannot fill again.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        prompt ([`Prompt`]): The prompts.
        ids (`int`), columns (`int`): The most token ids, and the most tokens, that the text may have in the end.
    """
    ends = [length for length in rope_switches(model.config) if prompt.read <= length < columns]
    if prompt.read and ends and is_dropped(prompt.cache, model, prompt.start_B.new_zeros(1, ids)):
        raise NotImplementedError(
            f"This model's rotary embeddings change at {ends[0]} tokens, where it reads the whole text again. The "
            f"text may reach {columns}, and `mtp=True` cannot repeat that for a cache that was passed, or for a "
            "prompt with images or `position_ids`. Leave these out, lower `max_new_tokens`, or decode with mtp=False."
        )


def refuse_for_sequences(
    prompt: Prompt, is_static: bool, synced_gpus: bool | None, recomputes: bool, in_step: bool, changes_rope: bool
) -> None:
    """Raises `NotImplementedError` for requests that need a model that allows trees.

    Args:
        prompt ([`Prompt`]): The prompts.
        is_static (`bool`): Whether a static cache is requested.
        synced_gpus (`bool`, *optional*): As passed to `generate`.
        recomputes (`bool`): Whether each pass reads the text from its start.
        in_step (`bool`): Whether a processor or criterion must see all rows at the same length.
        changes_rope (`bool`): Whether the text may reach a length at which the rotary embeddings change.
    """
    batch = len(prompt.rows) > 1 or bool(prompt.start_B.any())
    for asked, what, instead in (
        (is_static, "a static cache", "Leave `cache_implementation` out"),
        (prompt.hidden_BP.any(), "an attention mask with holes", "Pad on the left: tokenizer.padding_side = 'left'"),
        (prompt.extra.layers, "cross-attention to an image", "Leave the image out"),
        (prompt.extra.inputs, "other inputs with each token", f"Leave out {', '.join(prompt.extra.inputs)}"),
        (recomputes and prompt.read, "a cache that is not empty", "Pass none"),
        (recomputes and prompt.unread_BT.dim() == 3, "`inputs_embeds`", "Pass `input_ids`"),
        (recomputes and prompt.offset_B.any(), "`position_ids`", "Leave them out"),
        (batch and prompt.read, "a batch that continues from a cache", "Pass one sequence at a time"),
        (batch and synced_gpus, "a batch with `synced_gpus`", "Pass one sequence at a time"),
        (batch and changes_rope, "a batch of texts as long as these", "Pass one sequence at a time"),
        (in_step, "a processor or criterion that may look at a whole batch", "Pass one sequence at a time"),
    ):
        if asked:
            raise NotImplementedError(
                f"This model supports only one plain sequence at a time, so `mtp=True` does not support {what}. "
                f"{instead}, or decode with mtp=False."
            )


def refuse_bitwise(model: PreTrainedModel, prompt: Prompt, columns: int, is_tree: bool, in_chunks: bool) -> None:
    """Raises `NotImplementedError` for requests whose passes cannot repeat plain decoding bit for bit.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        prompt ([`Prompt`]): The prompts.
        columns (`int`): The most tokens that the text may have in the end.
        is_tree (`bool`): Whether the model allows trees.
        in_chunks (`bool`): Whether prompts are read in chunks.
    """
    kinds = attention_kinds(model.config.get_text_config(decoder=True))
    limits = [kind.reaches_back() for kind in kinds if kind.reaches_back() is not None]
    layers = () if prompt.cache is None else prompt.cache.layers
    is_static = any(isinstance(layer, cache_utils.StaticLayer) for layer in layers)  # requested or passed
    is_padded = bool(prompt.start_B.any()) or prompt.hidden_BP.shape[1] > 0
    for asked, what, instead in (
        (not is_tree, "a model that reads plain sequences only", "Leave it out"),
        (is_static, "a static cache, whose length decides how sums are rounded", "Use a dynamic one"),
        (in_chunks, "`prefill_chunk_size`", "Leave it out"),
        (is_padded, "padded prompts", "Pass prompts of the same length, or one prompt at a time"),
        (prompt.extra.is_in_use, "other inputs than text", "Leave them out"),
        (
            min(limits, default=columns) < columns,
            f"texts longer than the window of {min(limits, default=0)} tokens",
            "Lower `max_new_tokens`",
        ),
        (torch.is_autocast_enabled(model.device.type), "autocast", "Load the model in the dtype that you want"),
    ):
        if asked:
            raise NotImplementedError(
                f"`mtp_bitwise=True` does not support {what}: passes over several tokens would round differently "
                f"than plain decoding. {instead}, or leave out `mtp_bitwise`."
            )
