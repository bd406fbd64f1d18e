"""The n-gram table: which tokens most often follow the last one, two or three tokens in a model's own texts.

Its drafts cost no masks. Retrieving drafts from a fixed collection of texts is the idea of REST (He et al., 2023,
arXiv 2311.08252).

Shapes: N contexts of the table, C candidates of a context, T tokens of all texts, P different pairs of a context and
the token after it.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

NGRAMS_NAME = "ngrams.safetensors"  # beside an adapter's weights
LONGEST_CONTEXT = 3  # tokens
CANDIDATES = 3  # next tokens that are kept of a context
NO_CANDIDATE = -1
BITS = 20  # of a token in a key; three tokens fit into 63 bits
LEAST_COUNT = 2  # a continuation that was seen once may be chance
SAME = 0.1  # a longer context is left out if the probability changes by less
DTYPES = {"contexts": np.int64, "tokens": np.int32, "probabilities": np.float16}


class NgramTable:
    """The likeliest next tokens by the last tokens of a text. Immutable.

    Make one with [`count_ngrams`]. Set `model.peft_config[adapter].ngrams` to it; the adapter then saves and loads it.

    Args:
        contexts (`np.ndarray` of shape `(N,)`): Keys of the contexts, in ascending order.
        tokens (`np.ndarray` of shape `(N, C)`): The likeliest next tokens of each, likeliest first; -1 if there are
            fewer.
        probabilities (`np.ndarray` of shape `(N, C)`): How likely each token is.

    Raises:
        ValueError: These are not the arrays of a table.
    """

    def __init__(self, contexts: np.ndarray, tokens: np.ndarray, probabilities: np.ndarray):
        arrays = {"contexts": contexts, "tokens": tokens, "probabilities": probabilities}
        for name, array in arrays.items():
            shape = (len(contexts),) if name == "contexts" else (len(contexts), CANDIDATES)
            if array.dtype != DTYPES[name] or array.shape != shape:
                raise ValueError(
                    f"`{name}` of an n-gram table must have dtype {np.dtype(DTYPES[name])} and shape {shape}, but has "
                    f"{array.dtype} and {array.shape}."
                )
        has_first = not len(tokens) or tokens[:, 0].min() >= 0
        if (contexts[1:] <= contexts[:-1]).any() or not has_first or not np.isfinite(probabilities).all():
            raise ValueError("An n-gram table needs ascending contexts, token ids and finite probabilities.")
        self.contexts, self.tokens, self.probabilities = contexts, tokens, probabilities

    def __len__(self) -> int:
        return len(self.contexts)

    def __deepcopy__(self, memo: dict) -> "NgramTable":
        return self  # configs are copied often

    def after(self, context: Sequence[int], count: int) -> Iterator[list[tuple[int, float]]]:
        """The likeliest continuation, one token after the other.

        Each token is looked up by the longest known context. The continuation ends where not even the last token is
        known.

        Args:
            context (`Sequence[int]`): The last tokens of a text.
            count (`int`): Most steps.

        Yields:
            `list[tuple[int, float]]`: The candidates of each step with their probabilities, likeliest first. The next
            step continues from the first candidate.
        """
        last = list(context[-LONGEST_CONTEXT:])
        for _ in range(count):
            place = self._place(last)
            if place is None:
                return
            candidates = zip(self.tokens[place].tolist(), self.probabilities[place].tolist(), strict=True)
            found = [(token, probability) for token, probability in candidates if token != NO_CANDIDATE]
            yield found
            last = [*last[1 - LONGEST_CONTEXT :], found[0][0]]

    def _place(self, context: list[int]) -> int | None:
        for start in range(len(context)):
            key = _key(context[start:])
            place = int(self.contexts.searchsorted(key))
            if place < len(self) and self.contexts[place] == key:
                return place
        return None

    def refuse_other_base(self, vocab_size: int | None) -> None:
        """Raises a `ValueError` if the table has tokens that the base of its adapter does not have.

        Args:
            vocab_size (`int`, *optional*): Tokens of the base's vocabulary, if known.
        """
        largest = int(self.tokens.max(initial=0))
        if vocab_size is not None and largest >= vocab_size:
            raise ValueError(
                f"The n-gram table has token ids up to {largest}, but the base's vocabulary has {vocab_size} tokens: "
                f"it was counted with another tokenizer. Count it again with `hf-mtp ngrams`, or delete {NGRAMS_NAME}."
            )

    def save(self, folder: str | Path) -> None:
        """Writes the table into an adapter's folder."""
        save_file({name: getattr(self, name) for name in DTYPES}, Path(folder, NGRAMS_NAME), {"format": "np"})

    @classmethod
    def load(cls, file: str | Path) -> "NgramTable":
        """Reads a table.

        Args:
            file (`str` or `Path`): What [`NgramTable.save`] wrote.

        Raises:
            ValueError: The file is truncated, or holds something else.
        """
        try:
            return cls(**load_file(file))
        except (SafetensorError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} is not an n-gram table ({error}): it is truncated or was modified. Download it again, write "
                "it again with `hf-mtp ngrams`, or delete it."
            ) from error


def save_ngrams(table: NgramTable | None, folder: str | Path, keep: bool) -> None:
    """Writes an adapter's n-gram table into its folder.

    Args:
        table ([`NgramTable`], *optional*): The table, if the adapter has one.
        folder (`str` or `Path`): The folder.
        keep (`bool`): Whether a table in the folder belongs to the adapter, if this is `None`. Else it is removed.
    """
    if table is not None:
        table.save(folder)
    elif not keep:
        Path(folder, NGRAMS_NAME).unlink(missing_ok=True)


def _key(context: Sequence[int]) -> int:
    """A number for a context of one to three tokens. Tokens count from 1, so a shorter context has smaller keys."""
    key = 0
    for token in context:
        key = key << BITS | token + 1
    return key


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
    id_T = np.array([id for text in texts for id in (-1, *text)], dtype=np.int64) + 1
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
