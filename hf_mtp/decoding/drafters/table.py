"""Drafts from the adapter's n-gram table: what the model most often wrote after the last tokens of a row."""

import weakref

from ...adapter.ngram_table import LONGEST_CONTEXT, NgramTable
from ..sequence import Sequence
from .acceptance import Calibration
from .lookup import Found, LookupDrafter

MOST_TABLE_DRAFTS = 8


class TableDrafter(LookupDrafter):
    """Drafts the likeliest tokens by an n-gram table.

    Args:
        table ([`NgramTable`]): The table.
        calibration ([`Calibration`]): How often its tokens are right, by their probability in the table. The drafter
            updates it, also by tokens that were not chosen as drafts.
    """

    def __init__(self, table: NgramTable, calibration: Calibration):
        super().__init__()
        self.table, self.calibration = table, calibration
        self._last: weakref.WeakKeyDictionary[Sequence, list[int]] = weakref.WeakKeyDictionary()  # tokens of the text
        # What was looked up last: tokens and their probabilities in the table.
        self._read: weakref.WeakKeyDictionary[Sequence, list[tuple[int, float]]] = weakref.WeakKeyDictionary()

    def learn(self, sequence: Sequence, tokens: list[int]) -> None:
        """Compares what was looked up last with the new tokens, up to the first that is wrong."""
        for (drafted, probability), token in zip(self._read.pop(sequence, ()), tokens, strict=False):
            self.calibration.count(probability, drafted == token)
            if drafted != token:
                break
        text = [*self._last[sequence], *tokens] if sequence in self._last else sequence.text
        self._last[sequence] = text[-LONGEST_CONTEXT:]

    def look_up(self, sequence: Sequence, count: int) -> Found:
        """What the table has after a row's last tokens."""
        wanted = min(count, MOST_TABLE_DRAFTS)
        read = self._read[sequence] = list(self.table.after(self._last[sequence], wanted))
        return Found([token for token, _ in read], [self.calibration.rate(probability) for _, probability in read])
