"""Attaches adapters to a base model without modifying it: `attach(base, adapter)` and `custom_generate`."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from threading import Lock

from peft import PeftModel
from transformers import PreTrainedModel

from .adapter.access import refuse_without_access
from .adapter.config import GatedLoraConfig
from .base.inspection import input_device
from .decoding.generate import arguments_by_name
from .model import GatedLoraModel

_STORE = "_mtp_attached_adapters"  # the attribute of a base that holds its adapters
# Arguments of `generate` that transformers uses to find `generate.py`; the first ones find the adapter, too.
_FOR_LOADING = ("token", "cache_dir", "force_download", "local_files_only")
_FOR_FINDING = (*_FOR_LOADING, "revision", "proxies", "repo_type", "subfolder")


# The bases that are decoding with an adapter in this thread. Nested calls of their `generate` are transformers' own.
_decoding: ContextVar[tuple[PreTrainedModel, ...]] = ContextVar("decoding", default=())


def attach(base: PreTrainedModel, adapter: str, revision: str | None = None, **hub) -> None:
    """Makes `base.generate` decode with an adapter, for code that takes a base model and calls its `generate`.

    If the adapter was attached before, it is loaded again, because it may have been trained since. The layers,
    parameters, names and saved files of the base do not change: it can be trained, get a LoRA and be saved as before.
    `mtp=False` in a call or in its generation config gives plain decoding. `del base.generate` detaches the adapter.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base.
        adapter (`str`): Hub id or folder of the adapter.
        revision (`str`, *optional*): The adapter's branch or commit.
        hub: `token`, `cache_dir`, `force_download` and `local_files_only` of `from_pretrained`.

    Raises:
        OSError: The adapter does not exist, or you have no access to it.
        ValueError: The adapter does not fit the base.
        TypeError: `base` is not a transformers model, but a `PeftModel`, for example.
    """
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"`attach` takes a model of transformers, but got {type(base).__name__}. Pass its base model, "
            "`model.get_base_model()`, or attach the adapter before you wrap the base."
        )
    _adapters_of(base).load(base, adapter, revision, **hub)
    # As transformers does it for a base whose repository has a `generate` of its own.
    base.generate = partial(generate_with_adapter, base, adapter, revision)


def generate_with_adapter(
    model: PreTrainedModel, adapter: str, revision: str | None = None, /, *args, mtp: bool | None = None, **kwargs
):
    """Generates with an adapter, without modifying the base.

    The first call loads the adapter. The layers, parameters and plain `generate` of the base do not change. Later
    calls reuse the adapter, from any thread. It lives as long as the base.

    The first three arguments are positional only, because `kwargs` may also contain a `revision`: that of
    `generate.py`.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        adapter (`str`): Hub id or folder of the adapter.
        revision (`str`, *optional*): The adapter's commit.
        mtp (`bool`, *optional*): Whether to use multi-token prediction. If `None`, the generation config decides; if
            it does not set `mtp`, the default is `True`.
        args, kwargs: Arguments of [`GatedLoraModel.generate`], and those by which transformers found the adapter:
            `token`, `cache_dir` and the like.

    Returns:
        What [`GatedLoraModel.generate`] returns.

    Raises:
        OSError: There is no such adapter, or you have no access to it.
        ValueError: The adapter does not fit the base, or [`GatedLoraModel.generate`] refuses an argument.
    """
    if any(base is model for base in _decoding.get()):
        return type(model).generate(model, *args, **kwargs)
    kwargs = arguments_by_name(model, args, kwargs)
    hub = {name: kwargs[name] for name in _FOR_LOADING if kwargs.get(name) is not None}
    arguments = {name: value for name, value in kwargs.items() if name not in _FOR_FINDING}
    configs = arguments.get("generation_config"), model.generation_config
    if mtp is None and all(getattr(config, "mtp", None) is None for config in configs):
        mtp = True
    upgraded = _adapters_of(model).get(model, adapter, revision, **hub)
    before = _decoding.set((*_decoding.get(), model))
    try:
        return upgraded.generate(mtp=mtp, **arguments)
    finally:
        _decoding.reset(before)


def place_in_call() -> str:
    """The folder or Hub id that the running `base.generate(custom_generate=...)` was called with.

    transformers does not pass this argument on, so it is read from the call itself.

    Raises:
        ValueError: No such call is running.
    """
    frame = inspect.currentframe()
    while frame is not None:
        named = frame.f_locals.get("custom_generate") if frame.f_code.co_name == "generate" else None
        if isinstance(named, str):
            return str(Path(named).resolve()) if Path(named).is_dir() else named
        frame = frame.f_back
    raise ValueError(
        "The adapter of this call cannot be found. Pass its folder or Hub id to each call: `base.generate(..., "
        "custom_generate=FOLDER_OR_HUB_ID, trust_remote_code=True)`. Or attach it to the base once, with "
        "`hf_mtp.attached.attach(base, FOLDER_OR_HUB_ID)`."
    )


def _adapters_of(base: PreTrainedModel) -> "AttachedAdapters":
    return base.__dict__.setdefault(_STORE, AttachedAdapters())  # one step, whatever another thread does


class AttachedAdapters:
    """The adapters attached to one base, each loaded once. A copy of the base loads its own."""

    def __init__(self):
        self._models: dict[tuple[str, str | None], GatedLoraModel] = {}
        self._lock = Lock()

    def get(self, base: PreTrainedModel, adapter: str, revision: str | None, **hub) -> GatedLoraModel:
        """The base upgraded with an adapter, which is loaded on first use.

        Args:
            base ([`~transformers.PreTrainedModel`]): The base.
            adapter (`str`): Hub id or folder of the adapter.
            revision (`str`, *optional*): The adapter's commit.
            hub: Arguments of `from_pretrained` that the Hub needs.
        """
        with self._lock:
            model = self._models.get((adapter, revision)) or self._load(base, adapter, revision, **hub)
            if model.masks_device != input_device(base):
                model.to(input_device(base))  # the base was moved, and left the adapter behind
            return model

    def load(self, base: PreTrainedModel, adapter: str, revision: str | None, **hub) -> None:
        """Loads an adapter, also if an earlier state of it was loaded before. Arguments are those of `get`."""
        with self._lock:
            self._load(base, adapter, revision, **hub)

    def _load(self, base: PreTrainedModel, adapter: str, revision: str | None, **hub) -> GatedLoraModel:
        before = self._models.get((adapter, revision))
        if before is not None and not before.is_stacked:  # its layers are in the place of the base's
            self._models.pop((adapter, revision)).unload()
        model = self._models[adapter, revision] = _attach(base, adapter, revision=revision, **hub)
        if before is not None and before.is_stacked:
            before.unload()
        return model

    def __reduce__(self):
        return AttachedAdapters, ()


def _attach(base: PreTrainedModel, adapter: str, **hub) -> GatedLoraModel:
    refuse_without_access(adapter, **hub)
    config = GatedLoraConfig.from_pretrained(adapter, **hub)
    config.beside = not config.target_parameters  # which can only be wrapped in their place
    with _kept_as_it_is(base):
        return PeftModel.from_pretrained(base, adapter, config=config, **hub).base_model


@contextmanager
def _kept_as_it_is(base: PreTrainedModel) -> Iterator[None]:
    """Restores `requires_grad` and training mode on exit: PEFT changes both, but the base may be in training."""
    trainable = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    training = [(module, module.training) for module in base.modules()]
    try:
        yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for module, mode in training:
            module.training = mode
