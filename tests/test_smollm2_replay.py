"""`examples/smollm2/replay.py`: recorded texts are decoded again, and no schedule beats hindsight."""

import random
from pathlib import Path

import pytest
from scripts import importable

from hf_mtp.decoding.schedule.costs import PassCosts

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "smollm2"
FREE = PassCosts([(1, 1.0), (81, 1.25)], [(2, 1.05), (81, 1.3)])
DEAR = PassCosts([(1, 1.0), (2, 2.0)], [(2, 9.0), (3, 10.0)])
K, PROMPT, LENGTH = 4, 9, 90


@pytest.fixture
def replay():
    with importable(EXAMPLE) as example:
        yield example("replay")


@pytest.fixture
def text(replay):
    """A text without repetition. The first candidate of a token is right, or the second, by chance."""
    ids, generator = [*range(LENGTH)], random.Random(0)
    draw = [generator.random() for _ in ids]
    candidates = {
        anchor: [
            [900, ids[place], 901, 902] if draw[place] < 0.4 else [ids[place], 900, 901, 902]
            for place in range(anchor + 2, min(anchor + 2 + K, LENGTH))
        ]
        for anchor in range(PROMPT - 1, LENGTH - 2)
    }
    confidences = {anchor: [0.7] * K for anchor in candidates}
    return replay.Text(ids, PROMPT, candidates, confidences)


def test_drafts_pay_where_columns_are_free_and_not_where_they_are_dear(replay, text):
    texts = [text] * 5
    methods = {name: replay.replay(texts, FREE, K, **options) for name, options in
            {"all": {}, "chain": {"siblings": 0}, "ngrams": {"masks": False}}.items()}  # fmt: skip
    assert {found.tokens for found in methods.values()} == {5 * (LENGTH - PROMPT)}
    assert methods["ngrams"].passes == 5 * (LENGTH - PROMPT)
    assert methods["all"].passes < methods["chain"].passes < 0.8 * methods["ngrams"].passes
    assert methods["all"].trees > 10 and not methods["chain"].trees
    dear = replay.replay(texts, DEAR, K)
    assert dear.with_masks < 30  # those of the first trial


def test_hindsight_is_the_least_cost(replay, text):
    tokens, best = replay.hindsight([text], FREE, K)
    assert tokens == LENGTH - PROMPT
    assert best < replay.replay([text], FREE, K).cost
    assert replay.hindsight([text], DEAR, K)[1] == tokens  # one plain pass for each token
