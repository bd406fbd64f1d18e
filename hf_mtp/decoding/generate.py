"""`generate(mtp=True)`: checks the arguments and passes the decode loop to transformers' own `generate`."""

import copy
import inspect
import warnings
from functools import cached_property

import torch
from transformers import PreTrainedModel, StoppingCriteriaList, StopStringCriteria
from transformers.utils import logging

from ..adapter.gate import refuse_adapter_names
from ..base.inspection import input_device, refuse_attention_without_masks, refuse_without_weights
from ..base.randomness import own_randomness
from ..passes.speculation_mode import SpeculationMode, speculation_mode
from .call import GenerateCall
from .checks import refuse_arguments
from .devices import to_device
from .drafters.base import Drafts
from .drafters.masks import draft
from .noise import draw_seed
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
        mtp_bitwise: bool | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ):
        """[`~transformers.GenerationMixin.generate`] with several tokens per forward pass and the same output.

        Greedy decoding returns the same tokens. Sampling draws from the same distribution with any logits processors,
        and the same seed returns the same text with any strategy. `mtp` and the arguments that begin with `mtp_` may
        also be attributes of the generation config, so that pipelines can use them without code changes.

        Args:
            mtp (`bool`, *optional*, defaults to `False`):
                Whether to use multi-token prediction. If not, this is exactly the base model's `generate`, which a
                `generator` seeds, too.
            mtp_strategy (`str`, *optional*, defaults to `"auto"`):
                `"quadratic"` appends a whole block of masks to every draft, so that each pass has drafts to verify.
                `"linear"` appends a block to the last draft only: passes are shorter, but after a rejected draft the
                next pass has no drafts to verify. `"auto"` computes the masks that are worth their cost on this
                machine, also drafts by prompt lookup and from the adapter's n-gram table, verifies second and third
                candidates where columns are cheap, and falls back to plain decoding while that is faster. For models
                that do not support trees, such as recurrent ones, `"auto"` is `"linear"`.
            mtp_k (`int`, *optional*, defaults to the adapter's `k`):
                Masks per block, which is the maximum number of drafts from masks per forward pass; at most the
                adapter's `k`.
            mtp_bitwise (`bool`, *optional*, defaults to `False`):
                Whether to compute regular tokens bit for bit as in plain decoding, so that the output is also
                identical in bfloat16 and float16, where near-ties may otherwise flip. Each pass then takes longer. A
                short trial checks whether the model and the device support it.
            generator (`torch.Generator`, *optional*):
                The generator that provides the seed for sampling; torch's global generator if `None`.
            args, kwargs:
                All arguments of `generate`.

        Returns:
            What `generate` returns. With `return_dict_in_generate=True` it is an [`MTPGenerateOutput`], which includes
            the counts. They are also in `model.mtp_statistics` afterwards.

        Raises:
            ValueError: The strategy is unknown, `mtp_k` is out of range, token ids are outside the vocabulary, a row
                is all padding, the cache is too short, or the generation mode cannot be exact (beam search,
                contrastive search, assisted generation, a quantized cache).
            NotImplementedError: The model does not support the strategy or, without tree support, a static cache; or
                `mtp_bitwise` cannot be guaranteed.
        """
        kwargs = arguments_by_name(self.model, args, kwargs)
        asked = {"mtp": mtp, "mtp_strategy": mtp_strategy, "mtp_k": mtp_k, "mtp_bitwise": mtp_bitwise}
        configs = [c for c in (kwargs.get("generation_config"), self.model.generation_config) if c is not None]
        asked = {name: _first_given(value, name, configs) for name, value in asked.items()}
        if not asked["mtp"]:
            return self._generate_plainly(generator, kwargs)
        if self.adapters_disabled:
            warnings.warn(
                "generate(mtp=True) was called while the adapter is disabled, so it uses plain decoding, one token "
                "per forward pass. The output is the same.",
                stacklevel=2,
            )
            return self._generate_plainly(generator, kwargs)
        refuse_without_weights(self.model)
        k = self._checked_k(asked["mtp_k"])
        strategy, mode = self._checked_strategy(asked["mtp_strategy"] or "auto")
        if strategy is None:
            return self._generate_plainly(generator, kwargs)
        healing = _first_given(kwargs.get("token_healing"), "token_healing", configs)
        refuse_arguments({**kwargs, "token_healing": healing})
        stop_strings_to_criteria(kwargs, configs)
        streamer, synced_gpus = kwargs.get("streamer"), kwargs.get("synced_gpus")
        bitwise = bool(asked["mtp_bitwise"])
        call = GenerateCall(self, mode, strategy, k, generator, streamer, synced_gpus, bitwise)
        set_use_cache(kwargs)
        kwargs, returned = to_device(kwargs, input_device(self.model))
        # Of the class, because a base may have got a `generate` of its own, such as that of an attached adapter.
        return returned(type(self.model).generate(self.model, custom_generate=call, **kwargs))

    def _generate_plainly(self, generator: torch.Generator | None, kwargs: dict):
        """Plain decoding. transformers' own `generate` takes no generator, and would draw from torch's global one."""
        if generator is None:
            return self.model.generate(**kwargs)
        with own_randomness(draw_seed(generator)):
            return self.model.generate(**kwargs)

    def _enable_peft_forward_hooks(self, *args, adapter_names: list[str] | None = None, **kwargs):
        configs = [kwargs.get("generation_config"), self.model.generation_config]
        if adapter_names is not None and _first_given(kwargs.get("mtp"), "mtp", configs):
            refuse_adapter_names(adapter_names)
        return super()._enable_peft_forward_hooks(*args, adapter_names=adapter_names, **kwargs)

    def _checked_k(self, mtp_k: int | None) -> int:
        trained = self.active_mtp_config.k
        if mtp_k is None:
            return trained
        if isinstance(mtp_k, bool) or not isinstance(mtp_k, int) or not 1 <= mtp_k <= trained:
            raise ValueError(f"`mtp_k` must be an integer from 1 to {trained}, the adapter's `k`, but got {mtp_k!r}.")
        return mtp_k

    def _checked_strategy(self, mtp_strategy: str) -> tuple[str | None, SpeculationMode]:
        """The strategy, or `None` where plain decoding is faster; and the mode that the model allows."""
        if mtp_strategy not in STRATEGIES:
            raise ValueError(
                f"`mtp_strategy` must be one of {', '.join(map(repr, STRATEGIES))}, but got {mtp_strategy!r}."
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
                f"generate(mtp=True) uses plain decoding, which is faster here: in a trial, {name} did not process "
                "several tokens with its cache exactly."
            )
            return None, mode
        if mode is SpeculationMode.NONE or mtp_strategy == "quadratic":
            raise NotImplementedError(
                f"{mtp_strategy} decoding of {name} would not be exact, because its speculation mode is "
                f"{mode.value!r}. Use mtp_strategy='auto'."
            )
        return mtp_strategy, mode

    @cached_property
    def schedules(self) -> ScheduleStore:
        """The adaptive schedules of earlier calls."""
        return ScheduleStore()

    def draft(
        self,
        pending_B: torch.LongTensor,
        hidden_BKD: torch.Tensor,
        noise_of=None,
        warpers=None,
        logits_BKV=None,
        siblings: int = 0,
    ) -> Drafts:
        """Drafts by the active adapter. Arguments are those of [`~hf_mtp.decoding.drafters.masks.draft`]."""
        return draft(self, pending_B, hidden_BKD, noise_of, warpers, logits_BKV, siblings)


def arguments_by_name(model: PreTrainedModel, args: tuple, kwargs: dict) -> dict:
    """The arguments of a model's `generate` by name, including those passed by position.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        args (`tuple`), kwargs (`dict`): As passed to `generate`.
    """
    # Of the class, because a base may have got a `generate` of its own, with any arguments.
    bound = inspect.signature(type(model).generate).bind_partial(model, *args, **kwargs).arguments
    return {
        **{name: value for name, value in bound.items() if name not in ("self", "kwargs")},
        **bound.get("kwargs", {}),
    }


def _first_given(value, name: str, configs: list):
    """The value passed to `generate`, or else that of the first generation config that sets it."""
    values = (value, *(getattr(config, name, None) for config in configs))
    return next((given for given in values if given is not None), None)


def set_use_cache(kwargs: dict) -> None:
    """Asks `generate` for a cache; some models' default is none.

    Args:
        kwargs (`dict`): Arguments of `generate`, changed in place.
    """
    config = kwargs.get("generation_config")
    if config is None:
        kwargs["use_cache"] = True
        return
    kwargs["generation_config"] = config = copy.deepcopy(config)  # transformers plans to take no arguments beside one
    config.use_cache = True
    kwargs.pop("use_cache", None)


def stop_strings_to_criteria(kwargs: dict, configs: list) -> None:
    """Replaces `stop_strings` and `tokenizer` by the criterion that transformers would create from them.

    This is needed because transformers passes no tokenizer on to a custom decode loop.

    Args:
        kwargs (`dict`): Arguments of `generate`, changed in place.
        configs (`list[GenerationConfig]`): The generation configs that may set `stop_strings`, by precedence.
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
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
    if not any(type(criterion) is StopStringCriteria for criterion in criteria):  # else the user's takes precedence
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    kwargs["stopping_criteria"] = criteria
