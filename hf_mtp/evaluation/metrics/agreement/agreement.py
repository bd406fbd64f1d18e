"""Agreement, as a module of the `evaluate` library. [`~hf_mtp.evaluation.measures`] computes it."""

import datasets
import evaluate

from hf_mtp.evaluation.measures import CITATION, agreement

_DESCRIPTION = """\
How far answers agree with those of plain decoding: the share of identical ones, and how much of an answer comes before
the first difference. Exact multi-token prediction has 1 and 1.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of int, or list of str): Token ids or texts of the answers.
    references (list of list of int, or list of str): The same of plain decoding.

Returns:
    identical: The share of equal answers.
    common_prefix: The mean share of the reference before the first difference.

Examples:

    >>> metric = evaluate.load(path)
    >>> metric.compute(predictions=[[5, 6, 7, 8], [1, 2]], references=[[5, 6, 9, 8], [1, 2]])
    {'identical': 0.5, 'common_prefix': 0.75}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Agreement(evaluate.Metric):
    """Agreement."""

    def _info(self):
        features = [
            datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
            datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")}),
        ]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=features,
            reference_urls=["https://arxiv.org/abs/2507.11851"],
        )

    def _compute(self, predictions, references):
        return agreement(predictions, references)
