"""Evaluation: `verify` checks that the output is unchanged, and `evaluate` measures the speedup.

`probe` measures how well a model predicts tokens beyond the next one.
"""

import importlib

_LAZY = {
    "ProbeResults": ".ranks.results",
    "Results": ".speed.results",
    "Suite": ".suites.suite",
    "SuitePrompt": ".suites.suite",
    "VerifyReport": ".exactness.verify",
    "evaluate": ".speed.runner",
    "load_metric": ".metrics",
    "load_probe": ".ranks.results",
    "load_results": ".speed.results",
    "load_suite": ".suites.suite",
    "probe": ".ranks.probe",
    "verify": ".exactness.verify",
    "write_card_section": ".speed.report",
    "write_probe": ".ranks.report",
    "write_report": ".speed.report",
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
