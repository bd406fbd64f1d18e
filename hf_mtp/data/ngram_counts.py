"""Counts the n-grams of tokenized texts.

Shapes: N contexts, C candidates of a context, T tokens of all texts, P different pairs of a context and the token
after it.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..adapter.ngram_table import BITS, CANDIDATES, DTYPES, LONGEST_CONTEXT, NO_CANDIDATE, NgramTable

LEAST_COUNT = 2  # a continuation that was seen once may be chance
SAME = 0.1  # a longer context is left out if the probability changes by less


class Counted(NamedTuple):
    """Contexts of one length in ascending order, their likeliest next tokens, their probabilities, and counts."""

    key_N: np.ndarray
    token_NC: np.ndarray
    probability_NC: np.ndarray
    count_N: np.ndarray


def count_tokens(texts: Iterable[Sequence[int]], size: int = 200_000) -> NgramTable:
    """The n-gram table of texts.

    A next token must have been seen twice. A longer context is left out if it predicts what the shorter one does.

    Args:
        texts (`Iterable[Sequence[int]]`): Token ids of each text.
        size (`int`, *optional*, defaults to 200000): Most contexts; of more, the most frequent are kept. A context
            takes 26 bytes.

    Raises:
        ValueError: A token id is negative or too large, or no n-gram occurs twice.
    """
    id_T = _joined(texts)
    found = [_likeliest(*_windows(id_T, length)) for length in range(1, LONGEST_CONTEXT + 1)]
    longer = [_without_known(*pair, length) for length, pair in enumerate(pairwise(found), start=1)]
    all_found = Counted(*(np.concatenate(arrays) for arrays in zip(found[0], *longer, strict=True)))
    if not len(all_found.key_N):
        raise ValueError("No n-gram occurs twice in these texts, so there is nothing to draft from. Pass more texts.")
    # Keys of longer contexts are larger, so the order of all is ascending, too.
    kept = np.sort(np.argsort(-all_found.count_N, kind="stable")[:size])
    arrays = zip(DTYPES.values(), all_found, strict=False)  # without the counts
    return NgramTable(*(values[kept].astype(dtype) for dtype, values in arrays))


def _joined(texts: Iterable[Sequence[int]]) -> np.ndarray:
    """`(T,)`: all texts, with a 0 before each, and tokens counted from 1."""
    id_T = np.fromiter((id for text in texts for id in (-1, *text)), dtype=np.int64) + 1
    if (id_T < 0).any() or (id_T >= 1 << BITS).any():
        raise ValueError(
            f"Token ids must be between 0 and {(1 << BITS) - 2} for an n-gram table, but the texts have "
            f"{id_T.min() - 1} to {id_T.max() - 1}."
        )
    return id_T


def _windows(id_T: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The key of each context of a length, and the token that follows it."""
    token = id_T[length:]
    key, is_inside = np.zeros_like(token), token > 0
    for place in range(length):
        column = id_T[place : place + len(token)]
        key, is_inside = key << BITS | column, is_inside & (column > 0)
    return key[is_inside], token[is_inside] - 1


def _likeliest(key: np.ndarray, token: np.ndarray) -> Counted:
    """Counts the tokens that follow each context."""
    pair_P2, count_P = np.unique(np.stack([key, token], axis=1), axis=0, return_counts=True)
    key_N, start_N, pairs_N = np.unique(pair_P2[:, 0], return_index=True, return_counts=True)
    count_N = np.add.reduceat(count_P, start_N) if len(start_N) else count_P
    falling_P = np.lexsort((-count_P, pair_P2[:, 0]))  # by context, and the most frequent pair first
    rank_C = np.arange(CANDIDATES)
    best_NC = falling_P[np.minimum(start_N[:, None] + rank_C, max(0, len(falling_P) - 1))]
    is_there_NC = (rank_C < pairs_N[:, None]) & (count_P[best_NC] >= LEAST_COUNT)
    token_NC = np.where(is_there_NC, pair_P2[best_NC, 1], NO_CANDIDATE)
    # One more than was counted: of so few, the first guess is none.
    probability_NC = np.where(is_there_NC, count_P[best_NC] / (count_N[:, None] + 1), 0.0)
    kept_N = is_there_NC[:, 0]
    return Counted(key_N[kept_N], token_NC[kept_N], probability_NC[kept_N], count_N[kept_N])


def _without_known(shorter: Counted, found: Counted, length: int) -> Counted:
    """Removes contexts that say the same as without their first token, when `length` are left."""
    if not len(shorter.key_N):
        return found
    end_N = found.key_N & (1 << BITS * length) - 1
    place_N = np.searchsorted(shorter.key_N, end_N).clip(max=len(shorter.key_N) - 1)
    is_same_NC = shorter.token_NC[place_N] == found.token_NC
    is_same_NC &= np.abs(shorter.probability_NC[place_N] - found.probability_NC) < SAME
    is_known_N = (shorter.key_N[place_N] == end_N) & is_same_NC.all(axis=1)
    return Counted(*(values[~is_known_N] for values in found))
