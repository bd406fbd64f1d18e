"""`generate(mtp=True)`: checks what was asked for and hands the decode loop to transformers' own `generate`."""

import warnings

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from ..base.support import refuse_attention_without_masks, refuse_without_weights
from .call import GenerateCall
from .pacing import Pacer, Whole
from .reading import Reading, reading_of
from .request import refuse_arguments, stop_strings_to_criteria
from .statistics import MTPStatistics

logger = logging.get_logger(__name__)

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
                faster. It is `"linear"` for models that read plain sequences only, such as recurrent ones.
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
            NotImplementedError: A strategy that the model's way of reading does not allow, or, for models that read
                plain sequences, a static cache.
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
        refuse_without_weights(self.model)
        k = self._checked_k(_or_default(mtp_k, defaults, "mtp_k", None))
        strategy, reading = self._checked_strategy(_or_default(mtp_strategy, defaults, "mtp_strategy", "auto"))
        if strategy is None:
            return self.model.generate(*args, **kwargs)
        refuse_arguments(kwargs)
        stop_strings_to_criteria(kwargs)
        streamer, synced_gpus = kwargs.get("streamer"), kwargs.get("synced_gpus")
        call = GenerateCall(self, reading, strategy, k, generator, streamer, synced_gpus)
        kwargs["use_cache"] = True  # some models' own default is not to
        return self.model.generate(*args, custom_generate=call, **kwargs)

    def _checked_k(self, mtp_k: int | None) -> int:
        trained = self.active_mtp_config.k
        if mtp_k is None:
            return trained
        if isinstance(mtp_k, bool) or not isinstance(mtp_k, int) or not 1 <= mtp_k <= trained:
            raise ValueError(f"`mtp_k` must be an integer from 1 to {trained}, the adapter's `k`, but got {mtp_k!r}.")
        return mtp_k

    def _checked_strategy(self, mtp_strategy: str) -> tuple[str | None, Reading]:
        """The strategy to use, and how the model is read; no strategy at all if it reads single tokens only."""
        if mtp_strategy not in STRATEGIES:
            raise ValueError(
                f"`mtp_strategy` must be one of {', '.join(map(repr, STRATEGIES))}, got {mtp_strategy!r}."
            )
        if mtp_strategy == "quadratic":
            refuse_attention_without_masks(self.model)
        reading, name = reading_of(self), type(self.model).__name__
        if reading is Reading.BRANCHES:
            logger.info("mtp_strategy=%r: %s reads branches", mtp_strategy, name)
            return mtp_strategy, reading
        if mtp_strategy == "auto":
            if not reading.pays:
                logger.warning_once(
                    f"generate(mtp=True) decodes plainly, which is faster: {name} reads {reading.value} exactly, but "
                    "does not go on from its cache by several tokens."
                )
                return None, reading
            logger.info("mtp_strategy='auto': linear, because %s reads %s", name, reading.value)
            return "linear", reading
        if reading is Reading.TOKENS or mtp_strategy == "quadratic":
            raise NotImplementedError(
                f"{name} reads {reading.value} exactly, but no branches, so {mtp_strategy} decoding would not be "
                "exact. Use mtp_strategy='auto'."
            )
        return mtp_strategy, reading

    def pace(self, strategy: str, batch: int, k: int, fixed_shape: bool) -> Whole | Pacer:
        """The strategy; an automatic one remembers, for this adapter, batch size and device, what passes cost."""
        if strategy != "auto":
            return Whole(linear=strategy == "linear")
        known = self.__dict__.setdefault("_pacers", {})
        name = (self.active_adapters[0], batch, k, fixed_shape, str(self.model.device))
        if name not in known:
            known[name] = Pacer(k, fixed_budget=2 * k) if fixed_shape else Pacer(k)
        return known[name]


def _or_default(value, config: GenerationConfig, name: str, default):
    """An argument of `generate`: as passed, else as the generation config has it, else the default."""
    if value is not None:
        return value
    return getattr(config, name, default)
