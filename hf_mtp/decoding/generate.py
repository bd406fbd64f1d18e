"""`generate(mtp=True)`: checks what was asked for and hands the decode loop to transformers' own `generate`."""

import copy
import inspect
import warnings

import torch
from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.utils import logging

from ..base.inspection import refuse_attention_without_masks, refuse_without_weights
from ..passes.speculation_mode import SpeculationMode, speculation_mode
from .call import GenerateCall
from .checks import refuse_arguments
from .drafters.base import Drafts
from .drafters.masks import draft
from .schedule.store import ScheduleStore
from .statistics import MTPStatistics

logger = logging.get_logger(__name__)

STRATEGIES = ("auto", "quadratic", "linear")


class GenerationMixin:
    """Adds `mtp=True` to the `generate` of a tuner.

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

        Greedy decoding returns the same tokens. Sampling draws from the same distribution, whatever the logits
        processors, and the same seed gives the same text, whatever the strategy. `mtp`, `mtp_strategy` and `mtp_k` may
        also be attributes of the generation config, so that a pipeline or a chat uses them with no change of code.

        Args:
            mtp (`bool`, *optional*, defaults to `False`):
                Whether to use multi-token prediction. If not, this is exactly the base model's `generate`.
            mtp_strategy (`str`, *optional*, defaults to `"auto"`):
                `"quadratic"` hangs a whole block of masks on every draft, so that each pass has drafts to verify.
                `"linear"` hangs one on the last draft only: passes are shorter, but the one after a rejected draft has
                none to verify. `"auto"` computes the masks that are worth their cost on this machine, takes drafts
                from the text itself where it repeats, and decodes plainly while that is faster. It is `"linear"` for
                models that read plain sequences only, such as recurrent ones.
            mtp_k (`int`, *optional*):
                Masks per block, and so drafts that masks give per forward pass: at most the adapter's `k`, which is
                the default.
            generator (`torch.Generator`, *optional*):
                Where sampling draws its seed from; torch's global generator if `None`.
            args, kwargs:
                Everything that `generate` takes.

        Returns:
            What `generate` returns; with `return_dict_in_generate=True` an [`MTPGenerateOutput`], which carries the
            counts. They are also in `model.mtp_statistics` afterwards.

        Raises:
            ValueError: An unknown strategy, `mtp_k` out of range, token ids outside the vocabulary, padding on the
                right, a row of nothing but padding, a cache too short, or a generation mode that cannot be exact
                (beam search, contrastive search, assisted generation, a quantized cache).
            NotImplementedError: A strategy that the model does not allow, or a static cache for models that read plain
                sequences.
        """
        kwargs = self._by_name(args, kwargs)
        asked = {"mtp": mtp, "mtp_strategy": mtp_strategy, "mtp_k": mtp_k}
        configs = [c for c in (kwargs.get("generation_config"), self.model.generation_config) if c is not None]
        asked = {name: _first_given(value, name, configs) for name, value in asked.items()}
        if not asked["mtp"]:
            return self.model.generate(**kwargs)
        if self.adapters_disabled:
            warnings.warn(
                "generate(mtp=True) was called while the adapter is disabled: decoding plainly, one token per forward "
                "pass, with the same output.",
                stacklevel=2,
            )
            return self.model.generate(**kwargs)
        refuse_without_weights(self.model)
        k = self._checked_k(asked["mtp_k"])
        strategy, mode = self._checked_strategy(asked["mtp_strategy"] or "auto")
        if strategy is None:
            return self.model.generate(**kwargs)
        refuse_arguments(kwargs)
        stop_strings_to_criteria(kwargs, configs)
        streamer, synced_gpus = kwargs.get("streamer"), kwargs.get("synced_gpus")
        call = GenerateCall(self, mode, strategy, k, generator, streamer, synced_gpus)
        kwargs["use_cache"] = True  # some models' own default is not to
        return self.model.generate(custom_generate=call, **kwargs)

    def _by_name(self, args: tuple, kwargs: dict) -> dict:
        """Arguments of `generate`, those passed by position among them."""
        bound = inspect.signature(self.model.generate).bind_partial(*args, **kwargs).arguments
        return {**{name: value for name, value in bound.items() if name != "kwargs"}, **bound.get("kwargs", {})}

    def _checked_k(self, mtp_k: int | None) -> int:
        trained = self.active_mtp_config.k
        if mtp_k is None:
            return trained
        if isinstance(mtp_k, bool) or not isinstance(mtp_k, int) or not 1 <= mtp_k <= trained:
            raise ValueError(f"`mtp_k` must be an integer from 1 to {trained}, the adapter's `k`, but got {mtp_k!r}.")
        return mtp_k

    def _checked_strategy(self, mtp_strategy: str) -> tuple[str | None, SpeculationMode]:
        """The strategy to use, and what the model allows; no strategy at all where plain decoding is faster."""
        if mtp_strategy not in STRATEGIES:
            raise ValueError(
                f"`mtp_strategy` must be one of {', '.join(map(repr, STRATEGIES))}, got {mtp_strategy!r}."
            )
        if mtp_strategy == "quadratic":
            refuse_attention_without_masks(self.model)
        mode, name = speculation_mode(self.model), type(self.model).__name__
        if mode is SpeculationMode.TREE:
            return mtp_strategy, mode
        if mtp_strategy == "auto":
            if mode.pays:
                logger.info("mtp_strategy='auto' is 'linear': %s allows the mode %r", name, mode.value)
                return "linear", mode
            logger.warning_once(
                f"generate(mtp=True) decodes plainly, which is faster: {name} cannot read several tokens behind its "
                "cache exactly."
            )
            return None, mode
        if mode is SpeculationMode.NONE or mtp_strategy == "quadratic":
            raise NotImplementedError(
                f"{mtp_strategy} decoding of {name} would not be exact: it allows the mode {mode.value!r} only. Use "
                "mtp_strategy='auto'."
            )
        return mtp_strategy, mode

    @property
    def schedules(self) -> ScheduleStore:
        """What automatic schedules learned about this model."""
        return self.__dict__.setdefault("_schedules", ScheduleStore())

    def draft(
        self, pending_B: torch.LongTensor, hidden_BKD: torch.Tensor, noise_of=None, warpers=None, logits_BKV=None
    ) -> Drafts:
        """What the active adapter drafts from the states of one block of masks per row.

        Arguments are those of [`~hf_mtp.decoding.drafters.masks.draft`].
        """
        return draft(self, pending_B, hidden_BKD, noise_of, warpers, logits_BKV)


def _first_given(value, name: str, configs: list):
    """An argument of `generate`: as passed, else as the first generation config that sets it has it."""
    values = (value, *(getattr(config, name, None) for config in configs))
    return next((given for given in values if given is not None), None)


def stop_strings_to_criteria(kwargs: dict, configs: list) -> None:
    """Turns `stop_strings` and `tokenizer` into the criterion that transformers would make of them.

    transformers hands no tokenizer on to a custom decode loop.

    Args:
        kwargs (`dict`): Arguments of `generate`, changed in place.
        configs (`list[GenerationConfig]`): Where else `stop_strings` may be, the first one first.
    """
    tokenizer = kwargs.pop("tokenizer", None)
    stop_strings = _first_given(kwargs.get("stop_strings"), "stop_strings", configs)
    if tokenizer is None or stop_strings is None:
        return
    if kwargs.get("generation_config") is not None:
        kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
        kwargs["generation_config"].stop_strings = None
    if "generation_config" not in kwargs or configs[-1].stop_strings is not None:
        kwargs["stop_strings"] = None  # an argument overrides the model's config
    criterion = StopStringCriteria(tokenizer, stop_strings)
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), criterion])
