"""The measures, and the same as metrics of the `evaluate` library, loaded offline."""

import pytest

from hf_mtp.evaluation.measures import (
    acceptance_per_position,
    agreement,
    first_difference,
    quartiles,
    repeated_share,
    tokens_per_pass,
)


def test_tokens_per_pass_is_pooled_and_a_mean_of_means():
    assert tokens_per_pass([90, 10], [30, 10]) == {"tokens_per_pass": 2.5, "tokens_per_pass_mean": 2.0}


@pytest.mark.parametrize("tokens, passes", [([], []), ([3], [0]), ([3, 4], [1])])
def test_tokens_per_pass_needs_passes(tokens, passes):
    with pytest.raises(ValueError, match="passes"):
        tokens_per_pass(tokens, passes)


def test_acceptance_is_pooled_over_answers_of_any_number_of_positions():
    assert acceptance_per_position([[4, 4], [6], [0, 0, 0]], [[3, 1], [3], [0, 0, 0]]) == [0.6, 0.25]
    assert acceptance_per_position([], []) == []
    with pytest.raises(ValueError, match="same answers"):
        acceptance_per_position([[4]], [[1, 1]])
    with pytest.raises(ValueError, match="More drafts were accepted than verified"):
        acceptance_per_position([[1]], [[2]])


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == first_difference([1, 2, 3], [1, 2]) == 2
    assert first_difference([], []) is None


def test_agreement():
    assert agreement([[5, 6, 7, 8], [1, 2]], [[5, 6, 9, 8], [1, 2]]) == {"identical": 0.5, "common_prefix": 0.75}
    assert agreement([[], [4]], [[], [5]]) == {"identical": 0.5, "common_prefix": 0.5}
    with pytest.raises(ValueError, match="at least one"):
        agreement([], [])


def test_repeated_share():
    assert repeated_share([1, 2, 3]) == repeated_share([]) == 0.0
    assert repeated_share([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)


def test_quartiles():
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


# ---------------------------------------------------------------- the `evaluate` library

CASES = {
    "tokens_per_pass": (
        {"tokens": [90, 10], "passes": [30, 10]},
        {"tokens_per_pass": 2.5, "tokens_per_pass_mean": 2.0},
    ),
    "acceptance_per_position": (
        {"drafted": [[4, 4], [6, 0]], "accepted": [[3, 1], [3, 0]]},
        {"acceptance_per_position": [0.6, 0.25]},
    ),
    "agreement": (
        {"predictions": [[5, 6, 7, 8], [1, 2]], "references": [[5, 6, 9, 8], [1, 2]]},
        {"identical": 0.5, "common_prefix": 0.75},
    ),
}


@pytest.fixture
def load_metric(tmp_path):
    """Loads a metric whose answers are kept in a temporary folder."""
    from hf_mtp.evaluation.metrics import load_metric

    return lambda name: load_metric(name, cache_dir=str(tmp_path / "cache"))


def test_every_folder_of_metrics_is_listed():
    from hf_mtp.evaluation.metrics import FOLDER, METRICS

    folders = [path.name for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert sorted(folders) == sorted(METRICS) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_metric_computes_at_once_and_bit_by_bit(name, load_metric):
    inputs, expected = CASES[name]
    metric = load_metric(name)
    assert metric.compute(**inputs) == expected
    for index in range(2):
        metric.add_batch(**{key: values[index : index + 1] for key, values in inputs.items()})
    assert metric.compute() == expected
    assert metric.module_type == "metric" and metric.citation and "Examples" in metric.inputs_description


def test_agreement_takes_texts(load_metric):
    metric = load_metric("agreement")
    assert metric.compute(predictions=["ab", "c"], references=["ax", "c"]) == {
        "identical": 0.5,
        "common_prefix": 0.75,
    }


def test_an_unknown_metric_is_named():
    from hf_mtp.evaluation.metrics import load_metric

    with pytest.raises(ValueError, match="no metric 'speed'.*'agreement'"):
        load_metric("speed")


@pytest.mark.parametrize("name", CASES)
def test_a_space_of_a_metric_has_what_the_hub_reads(name):
    from huggingface_hub import RepoCard

    from hf_mtp.evaluation.metrics import FOLDER

    card = RepoCard.load(FOLDER / name / "README.md", ignore_metadata_errors=False)
    assert card.data.sdk == "gradio" and {"evaluate", "metric"} <= set(card.data.tags)
    assert (FOLDER / name / card.data.app_file).is_file() and (FOLDER / name / "requirements.txt").is_file()
