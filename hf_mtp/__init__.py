"""Multi-token prediction for the causal language models of transformers, with unchanged output.

Importing the package registers its adapter type with PEFT, which imports torch. Names that need more packages are
imported on first use. The command `hf-mtp` registers the type only when a subcommand runs, so `hf-mtp --help` does not
import torch.
"""

import importlib
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("hf_mtp")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_LAZY = {
    "DecodingCallback": ".training.callbacks.decoding",
    "GatedLoraConfig": ".adapter.config",
    "GatedLoraModel": ".model",
    "MTPConfig": ".training.config",
    "MTPGenerateOutput": ".decoding.statistics",
    "MTPStatistics": ".decoding.statistics",
    "MTPTrainer": ".training.trainer",
    "NgramTable": ".adapter.ngram_table",
    "SupportReport": ".evaluation.support",
    "check_support": ".evaluation.support",
    "count_ngrams": ".data.ngrams",
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
    "NgramTable",
    "SupportReport",
    "check_support",
    "count_ngrams",
    "regenerate_responses",
]

_COMMANDS = ("hf-mtp", "hf-mtp.exe")  # the script that pip installs


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _registers() -> bool:
    """Whether to register the adapter type with PEFT now. Inside an engine such as vLLM, PEFT is not installed."""
    is_command = bool(sys.argv) and Path(sys.argv[0]).name in _COMMANDS
    return not is_command and importlib.util.find_spec("peft") is not None


if _registers():
    from .registration import register

    register()
