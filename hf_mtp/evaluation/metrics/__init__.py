"""Our measures as modules of the `evaluate` library. Each folder has the layout of a metric's Space on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate

FOLDER = Path(__file__).parent
METRICS = ("acceptance_per_position", "agreement", "tokens_per_pass")


def load_metric(name: str, **kwargs) -> evaluate.Metric:
    """Loads one of our metrics with `evaluate.load`, offline.

    Args:
        name (`str`): `"acceptance_per_position"`, `"agreement"` or `"tokens_per_pass"`.
        kwargs: Further arguments of `evaluate.load`, such as `experiment_id`.

    Raises:
        ValueError: There is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r} in hf_mtp. Choose one of {', '.join(map(repr, METRICS))}.")
    import evaluate

    return evaluate.load(str(FOLDER / name), **kwargs)
