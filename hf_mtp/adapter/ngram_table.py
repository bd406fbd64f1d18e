"""The n-gram table: which tokens most often follow the last one, two or three tokens in a model's own texts.

Its drafts cost no masks. Retrieving drafts from a fixed collection of texts is the idea of REST (He et al., 2023,
arXiv 2311.08252).

Shapes: N contexts, C candidates of a context.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

NGRAMS_NAME = "ngrams.safetensors"  # beside an adapter's weights
LONGEST_CONTEXT = 3  # tokens
CANDIDATES = 3  # next tokens that are kept of a context
NO_CANDIDATE = -1
BITS = 20  # of a token in a key; three tokens fit into 63 bits
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
