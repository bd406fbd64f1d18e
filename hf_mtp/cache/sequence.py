"""Caches of models that read one plain sequence at a time: the model's own, and the tokens that it has not read yet.

Shapes: one row; T regular columns, K drafts.
"""

import torch
from transformers import Cache

from .rows import Rows


class SequenceCache:
    """A model's own cache of one row, and the tokens that it has not read yet.

    Args:
        start_B (`torch.LongTensor` of shape `(1,)`): 0, for there is no padding.
        held (`Any`, *optional*): The model's own cache, as `generate` or the model made it.
    """

    def __init__(self, start_B: torch.LongTensor, held: Cache | None = None):
        self.rows, self.held = Rows(start_B), held
        self.unread_BU: torch.LongTensor | None = None  # counted in, but not in `held`
        # Of the last pass: new columns that were certain, all of them with what was unread before, and the drafts.
        self._certain, self._certain_BC, self._guesses_BK = 0, None, None

    @property
    def lengths(self) -> list[int]:
        """Tokens that the row holds, those not read included."""
        return self.rows.lengths

    @property
    def read(self) -> int:
        """How many of these the model's own cache has."""
        return self.rows.longest - (0 if self.unread_BU is None else self.unread_BU.shape[1])

    def split(self, regular_BT: torch.Tensor, drafts: int) -> tuple[torch.Tensor, torch.LongTensor]:
        """What is certain, unread tokens included, and the drafts behind it."""
        self._certain = regular_BT.shape[1] - drafts
        certain, self._guesses_BK = regular_BT.split([self._certain, drafts], dim=1)
        if regular_BT.dim() == 3:  # embeddings of a prompt, behind which there are no drafts
            self._guesses_BK = torch.empty(1, 0, dtype=torch.long, device=regular_BT.device)
        if self.unread_BU is not None and self.unread_BU.shape[1]:
            certain = torch.cat([self.unread_BU, certain], dim=1)
        self._certain_BC = certain
        return certain, self._guesses_BK

    def keep(self, tokens: list[int]) -> None:
        """Counts in the first regular columns of the last pass: what was certain, and accepted drafts."""
        self.unread_BU = self._guesses_BK[:, : max(0, tokens[0] - self._certain)]
        self.rows.add(tokens)

    def adopt(self, given: Cache) -> None:
        """Starts with the tokens of the given cache, which is the model's own."""
        self.rows.add([int(given.get_seq_length())])

    def give_back(self, given: Cache | None) -> Cache:
        """The model's own cache: it is the one that `generate` got, if it got any."""
        return self.held


class TextCache(SequenceCache):
    """A row's whole text; the model's own cache stays empty until the end."""

    def keep(self, tokens: list[int]) -> None:
        """Counts in the first regular columns of the last pass."""
        accepted = max(0, tokens[0] - self._certain)
        self.unread_BU = torch.cat([self._certain_BC, self._guesses_BK[:, :accepted]], dim=1)
        self.rows.add(tokens)
