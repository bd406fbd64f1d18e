"""`generate(mtp=True)`: checks what was asked for and hands the decode loop to transformers' own `generate`."""

import warnings
from collections.abc import Callable

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.utils import logging

from .cache import RollbackCache, cache_name
from .decoding import Task, decode
from .drafting import Draw
from .pacing import Pacer, Whole
from .peers import peers_unfinished
from .request import (
    Prompt,
    refuse_arguments,
    refuse_generation_config,
    refuse_prompt,
    refuse_short_cache,
    stop_strings_to_criteria,
)
from .statistics import MTPGenerateOutput, MTPStatistics
from .step import MaskedStep
from .support import refuse_attention_without_masks, refuse_unsupported, takes_4d_masks, takes_branches
from .transcript import Transcript
from .verification import WARPERS

logger = logging.get_logger(__name__)

COLUMNS_STEP = 256
STRATEGIES = ("auto", "quadratic", "linear")


class MTPGenerationMixin:
    """Adds `mtp=True` to the `generate` of a tuner model.

    Attributes:
        mtp_statistics ([`MTPStatistics`] or `None`): Counts of the latest `generate(mtp=True)`.
    """

    mtp_statistics: MTPStatistics | None = None

    def generate(
        self,
        *args,
        mtp: bool | None = None,
        mtp_strategy: str | None = None,
        mtp_k: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ):
        """[`~transformers.GenerationMixin.generate`] with several tokens per forward pass and the same output.

        Greedy decoding returns the same tokens, sampling draws from the same distribution, whatever the logits
        processors. `mtp`, `mtp_strategy` and `mtp_k` may also be attributes of the model's `generation_config`, so
        that a pipeline or a chat uses them with no change of code.

        Args:
            mtp (`bool`, *optional*, defaults to `False`):
                Whether to use multi-token prediction. If not, this is exactly the base model's `generate`.
            mtp_strategy (`str`, *optional*, defaults to `"auto"`):
                `"quadratic"` hangs whole blocks of masks on every draft, so that there are always drafts to verify;
                `"linear"` hangs them on the last draft only, which makes shorter passes that waste one after each
                rejected draft. `"auto"` computes the masks that are worth their time on this machine, as measured
                while decoding, takes drafts from the text itself where it repeats, and decodes plainly while that is
                faster; it is `"linear"` for models that take no branches.
            mtp_k (`int`, *optional*):
                Masks per block, and so drafts that masks give per forward pass: at most the adapter's `k`, which is
                the default.
            generator (`torch.Generator`, *optional*):
                Source of chance in sampling. torch's own if `None`.
            args, kwargs:
                Everything that `generate` takes.

        Returns:
            What `generate` returns; with `return_dict_in_generate=True` an [`MTPGenerateOutput`], which carries the
            counts. They are also in `model.mtp_statistics` afterwards.

        Raises:
            ValueError: An unknown strategy, `mtp_k` out of range, token ids outside the vocabulary, padding on the
                right, a row of nothing but padding, a cache too short, or a generation mode that cannot be exact
                (beam search, contrastive, assisted, a quantized cache, in a batch a processor with a state).
            NotImplementedError: Recurrent models, and batches for models that take no branches.
        """
        defaults = kwargs.get("generation_config") or self.model.generation_config
        mtp = _or_default(mtp, defaults, "mtp", False)
        if not mtp:
            return self.model.generate(*args, **kwargs)
        if self.adapters_disabled:
            warnings.warn(
                "generate(mtp=True) was called while the adapter is disabled: decoding plainly, one token per forward "
                "pass, with the same output.",
                stacklevel=2,
            )
            return self.model.generate(*args, **kwargs)
        k = self._checked_k(_or_default(mtp_k, defaults, "mtp_k", None))
        strategy = self._checked_strategy(_or_default(mtp_strategy, defaults, "mtp_strategy", "auto"))
        refuse_arguments(kwargs)
        stop_strings_to_criteria(kwargs)
        # transformers does not hand these on to a custom decode loop.
        streamer, synced_gpus = kwargs.get("streamer"), kwargs.get("synced_gpus")

        def decode_batch(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
            refuse_generation_config(generation_config)
            prompt = Prompt.of(input_ids, model_kwargs)
            refuse_prompt(prompt, input_ids, self.vocab_size)
            if not self._can_branch() and len(prompt.start_B) > 1:
                raise NotImplementedError(
                    f"{type(self.model).__name__} takes no branches, so rows of a batch could not go on at different "
                    "speeds. Pass one sequence at a time, or decode with mtp=False."
                )
            room = generation_config.max_length - input_ids.shape[1]
            columns = prompt.read + prompt.unread_BT.shape[1] + room - 1
            refuse_short_cache(prompt.cache, columns)
            returns_cache = generation_config.return_dict_in_generate or getattr(
                prompt.cache, "_is_user_defined", False
            )
            is_static = generation_config.cache_implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS
            warpers = LogitsProcessorList(processor for processor in logits_processor if type(processor) in WARPERS)
            task = Task(
                prompt_BT=prompt.unread_BT,
                k=k,
                processors=logits_processor,
                criteria=stopping_criteria,
                streamer=streamer,
                draw=Draw(warpers, generator) if generation_config.do_sample else None,
                keep_rows=returns_cache or is_static,
                fixed_shape=is_static,
                others_unfinished=peers_unfinished(self.model, synced_gpus),
            )
            pad_token = getattr(generation_config, "_pad_token_tensor", None)
            transcript = Transcript(input_ids, room, generation_config, 0 if pad_token is None else int(pad_token))
            cache = RollbackCache(
                prompt.start_B,
                columns=_fixed_columns(columns, k, generation_config) if is_static else None,
                offloading=generation_config.cache_implementation == "offloaded" and torch.cuda.is_available(),
            )
            if prompt.read:
                cache.take_over(prompt.cache)
            returns = generation_config.return_dict_in_generate
            step = MaskedStep(
                self,
                output_hidden_states=bool(returns and generation_config.output_hidden_states),
                output_attentions=bool(returns and generation_config.output_attentions),
                compiled=self._compiled_forward(generation_config) if is_static else None,
            )
            self.mtp_statistics = decode(
                step, task, transcript, cache, self._pace(strategy, len(prompt.start_B), k, is_static)
            )
            if streamer is not None:
                streamer.end()
            if returns_cache and prompt.cache is not None:
                cache.hand_over(prompt.cache)
            if not returns:
                return transcript.sequences
            return MTPGenerateOutput(
                sequences=transcript.sequences,
                scores=transcript.stacked("score"),
                logits=transcript.stacked("logits"),
                hidden_states=transcript.stacked("hidden_states"),
                attentions=transcript.stacked("attentions"),
                mtp_statistics=self.mtp_statistics,
                **{cache_name(MTPGenerateOutput.__dataclass_fields__): prompt.cache},
            )

        return self.model.generate(*args, custom_generate=decode_batch, **kwargs)

    def _checked_k(self, mtp_k: int | None) -> int:
        trained = self.active_mtp_config.k
        if mtp_k is None:
            return trained
        if isinstance(mtp_k, bool) or not isinstance(mtp_k, int) or not 1 <= mtp_k <= trained:
            raise ValueError(f"`mtp_k` must be an integer from 1 to {trained}, the adapter's `k`, but got {mtp_k!r}.")
        return mtp_k

    def _checked_strategy(self, mtp_strategy: str) -> str:
        """The strategy to use: what was asked for, or linear decoding for `"auto"` where no branches are taken."""
        if mtp_strategy not in STRATEGIES:
            raise ValueError(
                f"`mtp_strategy` must be one of {', '.join(map(repr, STRATEGIES))}, got {mtp_strategy!r}."
            )
        refuse_unsupported(self.model)
        if mtp_strategy == "quadratic":
            refuse_attention_without_masks(self.model)
        if mtp_strategy == "linear" or self._can_branch():
            return mtp_strategy
        if mtp_strategy == "quadratic":
            raise NotImplementedError(
                f"{type(self.model).__name__} does not compute a branch as it computes a sequence (alibi positions or "
                "2-D masks only), so quadratic decoding would not be exact. Use mtp_strategy='linear' or 'auto'."
            )
        logger.info("mtp_strategy='auto': linear, because %s takes no branches", type(self.model).__name__)
        return "linear"

    def _can_branch(self) -> bool:
        return takes_4d_masks(self.model) and takes_branches(self.model)

    def _pace(self, strategy: str, batch: int, k: int, fixed_shape: bool) -> Whole | Pacer:
        """The strategy; an automatic one remembers, for this adapter, batch size and device, what passes cost."""
        if strategy != "auto":
            return Whole(linear=strategy == "linear")
        known = self.__dict__.setdefault("_pacers", {})
        name = (self.active_adapters[0], batch, k, fixed_shape, str(self.model.device))
        if name not in known:
            known[name] = Pacer(k, fixed_budget=2 * k) if fixed_shape else Pacer(k)
        return known[name]

    def _compiled_forward(self, config: GenerationConfig) -> Callable | None:
        """The base's compiled forward pass, under the conditions under which `generate` itself would compile it."""
        if config.disable_compile or (self.model.device.type == "cpu" and config.compile_config is None):
            return None
        return self.model.get_compiled_call(config.compile_config)


def _fixed_columns(tokens: int, k: int, config: GenerationConfig) -> int:
    """Columns of a cache of fixed size: room for the longest output and one more pass.

    Rounded up, so that outputs of about the same length share one compiled graph.
    """
    columns = max(tokens, getattr(config, "max_cache_len", None) or 0) + (k + 1) ** 2 + k
    return -(-columns // COLUMNS_STEP) * COLUMNS_STEP


def _or_default(value, config: GenerationConfig, name: str, default):
    """An argument of `generate`: as passed, else as the generation config has it, else the default."""
    if value is not None:
        return value
    return getattr(config, name, default)
