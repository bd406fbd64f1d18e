"""Evaluation: `verify` checks that the output is unchanged, and `evaluate` measures the speedup.

`probe` measures how well a model predicts tokens beyond the next one.
"""

import importlib

_LAZY = {
    "ProbeResults": ".ranks",
    "Results": ".results",
    "Suite": ".suites",
    "SuitePrompt": ".suites",
    "VerifyReport": ".exactness",
    "evaluate": ".runner",
    "load_metric": ".metrics",
    "load_probe": ".ranks",
    "load_results": ".results",
    "load_suite": ".suites",
    "probe": ".probing",
    "verify": ".exactness",
    "write_card_section": ".report_files",
    "write_probe": ".rank_report",
    "write_report": ".report_files",
}

__all__ = [
    "ProbeResults",
    "Results",
    "Suite",
    "SuitePrompt",
    "VerifyReport",
    "evaluate",
    "load_metric",
    "load_probe",
    "load_results",
    "load_suite",
    "probe",
    "verify",
    "write_card_section",
    "write_probe",
    "write_report",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
