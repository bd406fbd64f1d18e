"""`generate(mtp=True)`: checks what was asked for and hands the decode loop to transformers' own `generate`."""

import warnings
from copy import deepcopy

import torch
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria
from transformers.utils import logging

from .decoding import MTPGenerateOutput, Strategy, decode_greedily
from .statistics import MTPStatistics
from .support import refuse_attention_without_masks, refuse_unsupported, takes_branches

logger = logging.get_logger(__name__)

STRATEGIES = ("quadratic", "linear", "auto")


class MTPGenerationMixin:
    """Adds `mtp=True` to the `generate` of a tuner model.

    Attributes:
        mtp_statistics ([`MTPStatistics`] or `None`): Counts of the latest `generate(mtp=True)`.
    """

    mtp_statistics: MTPStatistics | None = None

    def generate(self, *args, mtp: bool = False, mtp_strategy: str = "quadratic", mtp_k: int | None = None, **kwargs):
        """[`~transformers.GenerationMixin.generate`] with several tokens per forward pass and the same output.

        Args:
            mtp (`bool`, *optional*, defaults to `False`):
                Whether to use multi-token prediction. If not, this is exactly the base model's `generate`.
            mtp_strategy (`str`, *optional*, defaults to `"quadratic"`):
                `"quadratic"` hangs masks on every draft, so that there are always drafts to verify; `"linear"` hangs
                them on the last draft only, which makes shorter passes that waste one after each rejected draft;
                `"auto"` is `"quadratic"` where the model takes branches and `"linear"` elsewhere.
            mtp_k (`int`, *optional*):
                Drafts per forward pass, at most the adapter's `k`, which is the default.
            args, kwargs:
                Everything that `generate` takes.

        Returns:
            What `generate` returns; with `return_dict_in_generate=True` an [`MTPGenerateOutput`], which carries the
            counts. They are also in `model.mtp_statistics` afterwards.

        Raises:
            ValueError: An unknown strategy, `mtp_k` out of range, token ids outside the vocabulary, or a generation
                mode that cannot be exact (beam search, contrastive, assisted).
            NotImplementedError: Something that is to come: sampling, more than one sequence, padding, caches passed in
                or other than dynamic, `inputs_embeds`, hidden states and attentions as output, recurrent models.
        """
        if not mtp:
            return self.model.generate(*args, **kwargs)
        if self.adapters_disabled:
            warnings.warn(
                "generate(mtp=True) was called while the adapter is disabled: decoding plainly, one token per forward "
                "pass, with the same output.",
                stacklevel=2,
            )
            return self.model.generate(*args, **kwargs)
        k = self._checked_k(mtp_k)
        strategy = self._checked_strategy(mtp_strategy)
        _refuse_arguments(kwargs)
        # transformers hands neither streamer nor tokenizer on to a custom decode loop.
        streamer = kwargs.get("streamer")
        _stop_strings_to_criteria(kwargs)

        def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
            _refuse_generation_config(generation_config)
            _refuse_inputs(input_ids, self.vocab_size, model_kwargs)
            transcript, cache, statistics = decode_greedily(
                self, input_ids, k, strategy, logits_processor, stopping_criteria, generation_config, streamer
            )
            self.mtp_statistics = statistics
            if not generation_config.return_dict_in_generate:
                return transcript.sequence
            return MTPGenerateOutput(
                sequences=transcript.sequence,
                scores=transcript.scores,
                logits=transcript.logits,
                past_key_values=cache,
                mtp_statistics=statistics,
            )

        return self.model.generate(*args, custom_generate=decode, **kwargs)

    def _checked_k(self, mtp_k: int | None) -> int:
        trained = self.active_mtp_config.k
        if mtp_k is None:
            return trained
        if isinstance(mtp_k, bool) or not isinstance(mtp_k, int) or not 1 <= mtp_k <= trained:
            raise ValueError(f"`mtp_k` must be an integer from 1 to {trained}, the adapter's `k`, but got {mtp_k!r}.")
        return mtp_k

    def _checked_strategy(self, mtp_strategy: str) -> Strategy:
        if mtp_strategy not in STRATEGIES:
            raise ValueError(
                f"`mtp_strategy` must be one of {', '.join(map(repr, STRATEGIES))}, got {mtp_strategy!r}."
            )
        refuse_unsupported(self.model)
        if mtp_strategy == "linear":
            return "linear"
        if mtp_strategy == "quadratic":
            refuse_attention_without_masks(self.model)
        if takes_branches(self.model):
            return "quadratic"
        if mtp_strategy == "quadratic":
            raise NotImplementedError(
                f"{type(self.model).__name__} does not compute a branch as it computes a sequence (alibi positions or "
                "2-D masks only), so quadratic decoding would not be exact. Use mtp_strategy='linear' or 'auto'."
            )
        logger.info("mtp_strategy='auto': linear, because %s takes no branches", type(self.model).__name__)
        return "linear"


def _refuse_arguments(kwargs: dict) -> None:
    """Refuses arguments that `generate` would use up before the decode loop could see them."""
    if kwargs.get("custom_generate") is not None:
        raise ValueError("`custom_generate` and `mtp=True` are two ways to decode: pass one of them.")
    if kwargs.get("assistant_model") is not None:
        raise ValueError("`assistant_model` and `mtp=True` are two ways to make drafts: pass one of them.")
    for name in ("past_key_values", "inputs_embeds", "synced_gpus"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(f"`{name}` with `mtp=True` is not implemented yet: leave it out.")


def _stop_strings_to_criteria(kwargs: dict) -> None:
    """Turns `stop_strings` and `tokenizer` into the criterion that transformers would make of them."""
    tokenizer, config = kwargs.pop("tokenizer", None), kwargs.get("generation_config")
    stop_strings = kwargs.get("stop_strings") or getattr(config, "stop_strings", None)
    if tokenizer is None or stop_strings is None:
        return
    kwargs.pop("stop_strings", None)
    if config is not None:
        kwargs["generation_config"] = deepcopy(config)
        kwargs["generation_config"].stop_strings = None
    criterion = StopStringCriteria(tokenizer, stop_strings)
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), criterion])


def _refuse_generation_config(config: GenerationConfig) -> None:
    """Refuses modes by the final configuration, whether they come from the call or from the model's defaults."""
    inexact = {
        "num_beams": (config.num_beams or 1) > 1,
        "penalty_alpha": bool(config.penalty_alpha),
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        "guidance_scale": (config.guidance_scale or 1) != 1,
    }
    for name, asked in inexact.items():
        if asked:
            raise ValueError(
                f"`{name}={getattr(config, name)}` does not decode one sequence token by token, so `mtp=True` could "
                f"not return the same output. Drop `{name}`, or `mtp=True`."
            )
    coming = {
        "do_sample=True": config.do_sample,
        f"num_return_sequences={config.num_return_sequences}": (config.num_return_sequences or 1) > 1,
        f"cache_implementation={config.cache_implementation!r}": config.cache_implementation not in (None, "dynamic"),
        "use_cache=False": not config.use_cache,
        "output_hidden_states=True": config.output_hidden_states and config.return_dict_in_generate,
        "output_attentions=True": config.output_attentions and config.return_dict_in_generate,
        f"prefill_chunk_size={config.prefill_chunk_size}": config.prefill_chunk_size is not None,
    }
    for what, asked in coming.items():
        if asked:
            raise NotImplementedError(
                f"`{what}` with `mtp=True` is not implemented yet: `mtp=True` decodes greedily (do_sample=False), one "
                "sequence at a time, with a dynamic cache."
            )


def _refuse_inputs(input_ids: torch.LongTensor, vocab_size: int, model_kwargs: dict) -> None:
    if input_ids.shape[0] != 1:
        raise NotImplementedError(
            f"A batch of {input_ids.shape[0]} sequences with `mtp=True` is not implemented yet: pass one at a time."
        )
    if model_kwargs.get("attention_mask") is not None and not model_kwargs["attention_mask"].all():
        raise NotImplementedError("Padding with `mtp=True` is not implemented yet: pass the sequence without padding.")
    positions = model_kwargs.get("position_ids")
    if positions is not None and not torch.equal(
        positions, torch.arange(input_ids.shape[1], device=positions.device).expand_as(positions)
    ):
        raise NotImplementedError("`position_ids` with `mtp=True` are not implemented yet: leave them out.")
    if input_ids.min() < 0 or input_ids.max() >= vocab_size:
        raise ValueError(
            f"The prompt has token ids from {input_ids.min().item()} to {input_ids.max().item()}, but the vocabulary "
            f"has ids 0 to {vocab_size - 1}. Was it tokenized with this model's own tokenizer?"
        )
