"""The n-gram table: which token most often follows the last one, two or three tokens in a model's own texts.

Its drafts cost no masks. Retrieving drafts from a fixed collection of texts is the idea of REST (He et al., 2023,
arXiv 2311.08252); keeping one continuation per context follows N-Grammys (Stewart et al., 2024, arXiv 2411.03786).

Shapes: N contexts of the table, T tokens of all texts.
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
BITS = 20  # of a token in a key; three tokens fit into 63 bits
LEAST_COUNT = 2  # a continuation that was seen once may be chance
SAME = 0.1  # a longer context is left out if the probability changes by less
DTYPES = {"contexts": np.int64, "tokens": np.int32, "probabilities": np.float16}


class NgramTable:
    """The likeliest next token by the last tokens of a text. Immutable.

    Make one with [`count_ngrams`]. Set `model.peft_config[adapter].ngrams` to it; the adapter then saves and loads it.

    Args:
        contexts (`np.ndarray` of shape `(N,)`): Keys of the contexts, in ascending order.
        tokens (`np.ndarray` of shape `(N,)`): The likeliest next token of each.
        probabilities (`np.ndarray` of shape `(N,)`): How likely each is.

    Raises:
        ValueError: These are not the arrays of a table.
    """

    def __init__(self, contexts: np.ndarray, tokens: np.ndarray, probabilities: np.ndarray):
        arrays = {"contexts": contexts, "tokens": tokens, "probabilities": probabilities}
        for name, array in arrays.items():
            if array.dtype != DTYPES[name] or array.shape != (len(contexts),):
                raise ValueError(
                    f"`{name}` of an n-gram table must have dtype {np.dtype(DTYPES[name])} and shape "
                    f"({len(contexts)},), but has {array.dtype} and {array.shape}."
                )
        if (contexts[1:] <= contexts[:-1]).any() or (tokens < 0).any() or not np.isfinite(probabilities).all():
            raise ValueError("An n-gram table needs ascending contexts, token ids and finite probabilities.")
        self.contexts, self.tokens, self.probabilities = contexts, tokens, probabilities

    def __len__(self) -> int:
        return len(self.contexts)

    def __deepcopy__(self, memo: dict) -> "NgramTable":
        return self  # configs are copied often

    def after(self, context: Sequence[int], count: int) -> Iterator[tuple[int, float]]:
        """The likeliest continuation, one token after the other, with the probability of each.

        Each token is looked up by the longest known context. The continuation ends where not even the last token is
        known.

        Args:
            context (`Sequence[int]`): The last tokens of a text.
            count (`int`): Most tokens to return.
        """
        last = list(context[-LONGEST_CONTEXT:])
        for _ in range(count):
            place = self._place(last)
            if place is None:
                return
            token = int(self.tokens[place])
            yield token, float(self.probabilities[place])
            last = [*last[1 - LONGEST_CONTEXT :], token]

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
    """Contexts of one length in ascending order, their likeliest next token, its probability, and their counts."""

    key_N: np.ndarray
    token_N: np.ndarray
    probability_N: np.ndarray
    count_N: np.ndarray


def count_tokens(texts: Iterable[Sequence[int]], size: int = 200_000) -> NgramTable:
    """The n-gram table of texts.

    A continuation must have been seen twice. A longer context is left out if it predicts what the shorter one does.

    Args:
        texts (`Iterable[Sequence[int]]`): Token ids of each text.
        size (`int`, *optional*, defaults to 200000): Most contexts; of more, the most frequent are kept. A context
            takes 14 bytes.

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
    key_N, token_N, probability_N, _ = (values[kept] for values in all_found)
    return NgramTable(key_N, token_N.astype(np.int32), probability_N.astype(np.float16))


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
    pair, pair_count = np.unique(np.stack([key, token], axis=1), axis=0, return_counts=True)
    context, start = np.unique(pair[:, 0], return_index=True)
    context_count = np.add.reduceat(pair_count, start) if len(start) else pair_count
    most_frequent_first = np.lexsort((-pair_count, pair[:, 0]))
    best = most_frequent_first[start]
    probability = pair_count[best] / (context_count + 1)  # of so few, the first guess is none
    kept = pair_count[best] >= LEAST_COUNT
    return Counted(context[kept], pair[best, 1][kept], probability[kept], context_count[kept])


def _without_known(shorter: Counted, found: Counted, length: int) -> Counted:
    """Removes contexts that say the same as without their first token, when `length` are left."""
    if not len(shorter.key_N):
        return found
    end_N = found.key_N & (1 << BITS * length) - 1
    place_N = np.searchsorted(shorter.key_N, end_N).clip(max=len(shorter.key_N) - 1)
    is_known = (shorter.key_N[place_N] == end_N) & (shorter.token_N[place_N] == found.token_N)
    is_known &= np.abs(shorter.probability_N[place_N] - found.probability_N) < SAME
    return Counted(*(values[~is_known] for values in found))
