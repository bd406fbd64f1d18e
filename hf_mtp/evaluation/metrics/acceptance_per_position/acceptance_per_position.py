"""Acceptance per position, as a module of the `evaluate` library. [`~hf_mtp.evaluation.measures`] computes it."""

import datasets
import evaluate

from hf_mtp.evaluation.measures import CITATION, acceptance_per_position

_DESCRIPTION = """\
How often the first, second ... draft of a forward pass was accepted, pooled over answers. A draft counts as accepted
if it and all drafts before it in the same pass are the base model's own tokens.
"""

_KWARGS_DESCRIPTION = """
Args:
    drafted (list of list of int): For each answer, how many first, second ... drafts were verified.
    accepted (list of list of int): For each answer, how many of these were accepted.

Returns:
    acceptance_per_position: One rate per position.

Examples:

    >>> metric = evaluate.load(path)
    >>> metric.compute(drafted=[[4, 4], [6, 0]], accepted=[[3, 1], [3, 0]])
    {'acceptance_per_position': [0.6, 0.25]}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AcceptancePerPosition(evaluate.Metric):
    """Acceptance per position."""

    def _info(self):
        features = datasets.Features(
            {
                "drafted": datasets.Sequence(datasets.Value("int64")),
                "accepted": datasets.Sequence(datasets.Value("int64")),
            }
        )
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=features,
            reference_urls=["https://arxiv.org/abs/2507.11851"],
        )

    def _compute(self, drafted, accepted):
        return {"acceptance_per_position": acceptance_per_position(drafted, accepted)}
