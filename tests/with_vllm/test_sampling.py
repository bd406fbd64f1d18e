"""Sampled tokens have the distribution of the base, which is known exactly: all first three tokens are enumerated."""

import math
from collections import Counter

SAMPLES, LEAST = 2000, 8  # requests, and the fewest that a cell of the test may expect


def p_value(chi2: float, degrees: int) -> float:
    """Of the chi-squared distribution, by Wilson and Hilferty."""
    z = ((chi2 / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))


def agreement(drawn: list[tuple[int, ...]], probabilities: dict[tuple[int, ...], float]) -> float:
    """The p-value of samples. Rare ones share a cell."""
    counts, total = Counter(drawn), len(drawn)
    assert not counts.keys() - probabilities.keys()  # nothing that is impossible
    cells = [(counts[start], total * p) for start, p in probabilities.items() if total * p >= LEAST]
    cells.append((total - sum(seen for seen, _ in cells), total - sum(expected for _, expected in cells)))
    return p_value(sum((seen - expected) ** 2 / expected for seen, expected in cells), len(cells) - 1)


def drawn(group: list[dict]) -> list[tuple[int, ...]]:
    return [tuple(answer["tokens"]) for answer in group]


def known(case) -> tuple[dict, dict[tuple[int, ...], float]]:
    sampling = case.reference["sampling"]
    return sampling, {tuple(start): p for start, p in sampling["probabilities"]}


def test_samples_with_drafts_have_the_base_s_distribution(case, run):
    """With the CPU backend mended: see `correct_temperatures`."""
    case = case()
    sampling, probabilities = known(case)
    group = {"prompts": [sampling["prompt"]] * SAMPLES, "options": sampling["options"]}
    arguments = {"max_num_seqs": 50, "max_num_batched_tokens": 1500}
    result = run(case.task(group, arguments=arguments, patches=["correct_temperatures"]))
    assert result["metrics"]["vllm:spec_decode_num_accepted_tokens"] > SAMPLES / 50
    assert agreement(drawn(result["groups"][0]), probabilities) > 1e-3


def test_the_agreement_of_wrong_samples_is_small(case):
    """The test above can fail: samples with a wrong temperature are seen."""
    import random

    _, probabilities = known(case())
    colder = {start: p**1.3 for start, p in probabilities.items()}
    wrong = random.Random(0).choices(list(colder), list(colder.values()), k=SAMPLES)
    right = random.Random(0).choices(list(probabilities), list(probabilities.values()), k=SAMPLES)
    assert agreement(wrong, probabilities) < 1e-3 < agreement(right, probabilities)


def test_a_backend_that_cannot_verify_samples_drafts_for_greedy_requests_only(case, run):
    case = case()
    sampling, probabilities = known(case)
    samples = {"prompts": [sampling["prompt"]] * 400, "options": sampling["options"]}
    greedy = [{"temperature": 0}] * len(case.prompts)
    mixed = {"prompts": [*case.prompts, sampling["prompt"]], "options": [*greedy, {**sampling["options"], "seed": 1}]}
    result = run(case.task(samples, mixed, arguments={"max_num_seqs": 50, "max_num_batched_tokens": 1500}))
    assert agreement(drawn(result["groups"][0]), probabilities) > 1e-3
    assert not any(masks for _, masks in result["passes"][: 3 * 400 // 50])
    answers = result["groups"][1]
    assert [answer["tokens"] for answer in answers[:-1]] == [row["tokens"] for row in case.rows]
    assert any(new > 1 for answer in answers[:-1] for new, _ in answer["passes"])  # after the sample had ended
    assert drawn(answers[-1:])[0] in probabilities
