"""Adapters beside a base that its owner goes on to use as it is: `base.generate(custom_generate=adapter)`."""

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


# The bases that decode with an adapter in this thread: what their `generate` is called for is transformers' part.
_decoding: ContextVar[tuple[PreTrainedModel, ...]] = ContextVar("decoding", default=())


def attach(base: PreTrainedModel, adapter: str, revision: str | None = None, **hub) -> None:
    """Makes `base.generate` decode with an adapter, for code that is given a base and calls its `generate`.

    Layers, parameters, names and files of the base stay as they are: it can be trained, get a LoRA and be saved as
    before. `mtp=False` in a call or in its generation config gives plain decoding, and `del base.generate` ends it.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base.
        adapter (`str`): Hub id or folder of the adapter.
        revision (`str`, *optional*): The adapter's branch or commit.
        hub: `token`, `cache_dir`, `force_download` and `local_files_only` of `from_pretrained`.

    Raises:
        OSError: There is no such adapter, or it may not be read.
        ValueError: The adapter does not fit the base.
        TypeError: The model is not a base, but one with an adapter around it.
    """
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"`attach` takes a model of transformers, but got {type(base).__name__}. Pass the base inside it, "
            "`model.get_base_model()`, or attach the adapter before you make the other model of the base."
        )
    _adapters_of(base).get(base, adapter, revision, **hub)
    # As transformers does it for a base whose repository has a `generate` of its own.
    base.generate = partial(generate_with_adapter, base, adapter, revision)


def generate_with_adapter(
    model: PreTrainedModel, adapter: str, revision: str | None = None, /, *args, mtp: bool | None = None, **kwargs
):
    """Generates with an adapter that the base need not know.

    The first call loads the adapter and puts it beside the base, whose layers, parameters and plain `generate` stay
    as they are. Later calls use it again, from any thread. It lives as long as the base.

    The first three go by position, because `kwargs` may have a `revision` too: that of `generate.py`.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        adapter (`str`): Hub id or folder of the adapter.
        revision (`str`, *optional*): The adapter's commit.
        mtp (`bool`, *optional*): Whether to use multi-token prediction. If `None`, the generation config decides, and
            where it does not, the answer is yes.
        args, kwargs: Arguments of [`GatedLoraModel.generate`], and those by which transformers found the adapter:
            `token`, `cache_dir` and the like.

    Returns:
        What [`GatedLoraModel.generate`] returns.

    Raises:
        OSError: There is no such adapter, or it may not be read.
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
    """The folder or Hub id that the running `base.generate(custom_generate=...)` names.

    transformers passes this argument to nobody, so it is read from the call itself.

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
        "The place of the adapter is not known. Pass it to each call: "
        "`base.generate(..., custom_generate=FOLDER_OR_HUB_ID, trust_remote_code=True)`. Or attach it to the base, "
        "once, by `hf_mtp.attached.attach(base, FOLDER_OR_HUB_ID)`."
    )


def _adapters_of(base: PreTrainedModel) -> "AttachedAdapters":
    return base.__dict__.setdefault(_STORE, AttachedAdapters())  # one step, whatever another thread does


class AttachedAdapters:
    """The adapters beside one base, each loaded once. A copy of the base loads its own."""

    def __init__(self):
        self._models: dict[tuple[str, str | None], GatedLoraModel] = {}
        self._lock = Lock()

    def get(self, base: PreTrainedModel, adapter: str, revision: str | None, **hub) -> GatedLoraModel:
        """The base upgraded with an adapter, which is loaded the first time.

        Args:
            base ([`~transformers.PreTrainedModel`]): The base.
            adapter (`str`): Hub id or folder of the adapter.
            revision (`str`, *optional*): The adapter's commit.
            hub: Arguments of `from_pretrained` that the Hub needs.
        """
        key = adapter, revision
        with self._lock:
            if key not in self._models:
                self._models[key] = _attach(base, adapter, revision=revision, **hub)
            model = self._models[key]
            if model.masks_device != input_device(base):
                model.to(input_device(base))  # the base was moved, and left the adapter behind
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
    """PEFT freezes a base and switches it to evaluation; its owner may be training it."""
    trainable = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    training = [(module, module.training) for module in base.modules()]
    try:
        yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for module, mode in training:
            module.training = mode
