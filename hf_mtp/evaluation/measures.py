"""The metrics of multi-token prediction, each defined once: tokens per pass, acceptance, agreement.

The modules in `metrics/`, [`~hf_mtp.evaluation.evaluate`] and the trainer's callback all compute their figures here.
Pure functions of counts and token ids.
"""

import statistics
from collections.abc import Sequence

ALL = "all"  # the name of all domains, or positions, together
CITATION = """\
@article{samragh2025your,
  title = {Your LLM Knows the Future: Uncovering Its Multi-Token Prediction Potential},
  author = {Samragh, Mohammad and Kundu, Arnav and Harrison, David and Nishu, Kumari and Naik, Devang and Cho, Minsik
    and Farajtabar, Mehrdad},
  journal = {arXiv preprint arXiv:2507.11851},
  year = {2025}
}
"""


def tokens_per_pass(tokens: Sequence[int], passes: Sequence[int]) -> dict[str, float]:
    """New tokens per forward pass: pooled, and as a mean over answers.

    Every new token counts: accepted drafts, the token that the base itself adds to each pass (the bonus token), and
    the end token. Every forward pass counts, the one over the prompt included. So plain decoding has exactly 1.

    Args:
        tokens (`Sequence[int]`): New tokens of each answer.
        passes (`Sequence[int]`): Forward passes of each answer.

    Returns:
        `dict`: `tokens_per_pass`, all tokens divided by all passes (pooled); `tokens_per_pass_mean`, the mean over
        answers of each answer's own ratio.

    Raises:
        ValueError: The lists differ in length, there are no answers, or an answer took no pass.
    """
    if len(tokens) != len(passes):
        raise ValueError(
            f"Each answer needs a number of tokens and a number of passes, but got {len(tokens)} and {len(passes)} "
            "numbers."
        )
    if not tokens or min(passes) < 1:
        raise ValueError(
            "Tokens per pass needs at least one answer, and at least one forward pass for each, but got passes "
            f"{list(passes)[:8]}."
        )
    return {
        "tokens_per_pass": sum(tokens) / sum(passes),
        "tokens_per_pass_mean": statistics.fmean(new / taken for new, taken in zip(tokens, passes, strict=True)),
    }


def acceptance_per_position(drafted: Sequence[Sequence[int]], accepted: Sequence[Sequence[int]]) -> list[float]:
    """How often the first, second ... draft of a pass was accepted, pooled over answers.

    A draft counts as accepted if it and all drafts before it in the same pass are the base's own tokens.

    Args:
        drafted (`Sequence[Sequence[int]]`): For each answer, how many first, second ... drafts were verified.
        accepted (`Sequence[Sequence[int]]`): For each answer, how many of these were accepted.

    Returns:
        `list[float]`: One rate per position, up to the last position that was drafted at all.

    Raises:
        ValueError: The counts differ in length, or more drafts were accepted than verified.
    """
    if [len(row) for row in drafted] != [len(row) for row in accepted]:
        raise ValueError("`drafted` and `accepted` need the same answers, each with the same number of positions.")
    totals = [[0, 0] for _ in range(max(map(len, drafted), default=0))]
    for offered, right in zip(drafted, accepted, strict=True):
        for total, both in zip(totals, zip(offered, right, strict=True), strict=False):
            total[0] += both[0]
            total[1] += both[1]
    if any(right > offered for offered, right in totals):
        raise ValueError(f"More drafts were accepted than verified: {totals} (verified, accepted) by position.")
    while totals and not totals[-1][0]:
        totals.pop()
    return [right / offered if offered else 0.0 for offered, right in totals]


def first_difference(one: Sequence, other: Sequence) -> int | None:
    """The first index at which two sequences differ; `None` if they are equal.

    If one is the beginning of the other, they differ where it ends.

    Args:
        one, other (`Sequence`): Token ids, or texts.
    """
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))


def agreement(predictions: Sequence[Sequence], references: Sequence[Sequence]) -> dict[str, float]:
    """How far answers agree with those of plain decoding.

    Args:
        predictions (`Sequence[Sequence]`): Token ids or texts of the answers.
        references (`Sequence[Sequence]`): The same of plain decoding.

    Returns:
        `dict`: `identical`, the share of equal answers; `common_prefix`, the mean share of the reference that comes
        before the first difference.

    Raises:
        ValueError: There are no answers, or the lists differ in length.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"Agreement needs as many answers as references, at least one, but got {len(predictions)} and "
            f"{len(references)}."
        )
    places = [first_difference(*pair) for pair in zip(predictions, references, strict=True)]
    shared = [
        1.0 if place is None else place / max(1, len(reference))
        for place, reference in zip(places, references, strict=True)
    ]
    return {"identical": places.count(None) / len(places), "common_prefix": statistics.fmean(shared)}


def repeated_share(ids: Sequence[int]) -> float:
    """The share of 4-grams that repeat an earlier one of the answer. A text that loops is easy to predict.

    Args:
        ids (`Sequence[int]`): Token ids of the answer.
    """
    grams = [tuple(ids[start : start + 4]) for start in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, interpolated. A busy machine shows as a wide range.

    Args:
        values (`Sequence[float]`): At least one.
    """
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))
