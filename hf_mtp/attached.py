"""Adapters beside a base that its owner goes on to use as it is: `base.generate(custom_generate=adapter)`."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from peft import PeftModel
from transformers import PreTrainedModel

from .adapter.config import GatedLoraConfig
from .base.inspection import input_device
from .model import GatedLoraModel

_STORE = "_mtp_attached_adapters"  # the attribute of a base that holds its adapters
# Arguments of `generate` that transformers uses to find `generate.py`; the first ones find the adapter, too.
_FOR_LOADING = ("token", "cache_dir", "force_download", "local_files_only")
_FOR_FINDING = (*_FOR_LOADING, "revision", "proxies", "repo_type", "subfolder")


def generate_with_adapter(
    model: PreTrainedModel, adapter: str, revision: str | None = None, /, *, mtp: bool = True, **kwargs
):
    """Generates with an adapter that the base need not know.

    The first call loads the adapter and puts it beside the base, whose layers, parameters and plain `generate` stay
    as they are. Later calls use it again, from any thread. It lives as long as the base.

    The first three go by position, because `kwargs` may have a `revision` too: that of `generate.py`.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        adapter (`str`): Hub id or folder of the adapter.
        revision (`str`, *optional*): The adapter's commit.
        mtp (`bool`, *optional*, defaults to `True`): Whether to use multi-token prediction.
        kwargs: Arguments of [`GatedLoraModel.generate`], and those by which transformers found the adapter: `token`,
            `cache_dir` and the like.

    Returns:
        What [`GatedLoraModel.generate`] returns.

    Raises:
        OSError: There is no such adapter.
        ValueError: The adapter does not fit the base, or [`GatedLoraModel.generate`] refuses an argument.
    """
    hub = {name: kwargs[name] for name in _FOR_LOADING if kwargs.get(name) is not None}
    arguments = {name: value for name, value in kwargs.items() if name not in _FOR_FINDING}
    attached = model.__dict__.setdefault(_STORE, AttachedAdapters())  # one step, whatever another thread does
    return attached.get(model, adapter, revision, **hub).generate(mtp=mtp, **arguments)


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
