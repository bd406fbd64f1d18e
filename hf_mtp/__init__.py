"""Multi-token prediction for the causal language models of transformers, with unchanged output.

Importing the package registers its adapter type with PEFT. Names that need `trl` are imported on first use.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

from .adapter.config import GatedLoraConfig
from .decoding.statistics import MTPGenerateOutput, MTPStatistics
from .model import GatedLoraModel
from .registration import register

try:
    __version__ = version("hf_mtp")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_LAZY = {
    "DecodingCallback": ".training.callbacks.decoding",
    "MTPConfig": ".training.config",
    "MTPTrainer": ".training.trainer",
    "SupportReport": ".evaluation.support",
    "check_support": ".evaluation.support",
    "regenerate_responses": ".data.responses",
}

__all__ = [
    "DecodingCallback",
    "GatedLoraConfig",
    "GatedLoraModel",
    "MTPConfig",
    "MTPGenerateOutput",
    "MTPStatistics",
    "MTPTrainer",
    "SupportReport",
    "check_support",
    "regenerate_responses",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
