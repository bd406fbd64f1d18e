"""Tokens per pass, as a module of the `evaluate` library. [`~hf_mtp.evaluation.measures`] computes it."""

import datasets
import evaluate

from hf_mtp.evaluation.measures import CITATION, tokens_per_pass

_DESCRIPTION = """\
New tokens per forward pass, pooled over answers and as the mean of the answers' own ratios. Every new token counts:
accepted drafts, the token that the base itself adds to each pass (the bonus token), and the end token. Every forward
pass counts, the one over the prompt included. Plain decoding has exactly 1.
"""

_KWARGS_DESCRIPTION = """
Args:
    tokens (list of int): New tokens of each answer.
    passes (list of int): Forward passes of each answer.

Returns:
    tokens_per_pass: All tokens divided by all passes.
    tokens_per_pass_mean: The mean over answers of each answer's own ratio.

Examples:

    >>> metric = evaluate.load(path)
    >>> metric.compute(tokens=[90, 10], passes=[30, 10])
    {'tokens_per_pass': 2.5, 'tokens_per_pass_mean': 2.0}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class TokensPerPass(evaluate.Metric):
    """Tokens per pass."""

    def _info(self):
        features = datasets.Features({"tokens": datasets.Value("int64"), "passes": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=features,
            reference_urls=["https://arxiv.org/abs/2507.11851"],
        )

    def _compute(self, tokens, passes):
        return tokens_per_pass(tokens, passes)
