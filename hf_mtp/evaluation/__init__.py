"""Evaluation of an adapter: `verify` proves that the output is unchanged, `evaluate` measures what is gained."""

import importlib

_LAZY = {
    "Results": ".results",
    "Suite": ".suites",
    "SuitePrompt": ".suites",
    "VerifyReport": ".exactness",
    "evaluate": ".runner",
    "load_metric": ".metrics",
    "load_results": ".results",
    "load_suite": ".suites",
    "verify": ".exactness",
    "write_card_section": ".files",
    "write_report": ".files",
}

__all__ = [
    "Results",
    "Suite",
    "SuitePrompt",
    "VerifyReport",
    "evaluate",
    "load_metric",
    "load_results",
    "load_suite",
    "verify",
    "write_card_section",
    "write_report",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
