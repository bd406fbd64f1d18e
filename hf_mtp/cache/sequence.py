"""Caches for models that read one plain sequence at a time: the model's own cache, and the tokens it has not read yet.

Shapes: one row; T regular columns, K drafts.
"""

import torch
from transformers import Cache

from .rows import Rows


class SequenceCache:
    """A model's own cache of one row, and the tokens that it has not read yet.

    Args:
        start_B (`torch.LongTensor` of shape `(1,)`): 0, since such rows have no padding.
        held ([`~transformers.Cache`], *optional*): The model's own cache. `None` until the model creates one.
    """

    def __init__(self, start_B: torch.LongTensor, held: Cache | None = None):
        self.rows, self.held = Rows(start_B), held
        self.unread_BU: torch.LongTensor | None = None  # kept tokens that are not in `held`
        # The last pass: number of new columns before its drafts, all columns before its drafts, and the drafts.
        self._new, self._confirmed_BC, self._draft_BK = 0, None, None

    @property
    def read(self) -> int:
        """How many of the row's tokens are in the model's own cache."""
        return self.rows.longest - (0 if self.unread_BU is None else self.unread_BU.shape[1])

    def split(self, regular_BT: torch.Tensor, drafts: int) -> tuple[torch.Tensor, torch.LongTensor]:
        """Splits the columns of a pass into confirmed tokens, preceded by the unread ones, and drafts."""
        self._new = regular_BT.shape[1] - drafts
        confirmed, self._draft_BK = regular_BT.split([self._new, drafts], dim=1)
        if regular_BT.dim() == 3:  # embeddings of a prompt, which no drafts follow
            self._draft_BK = torch.empty(1, 0, dtype=torch.long, device=regular_BT.device)
        if self.unread_BU is not None and self.unread_BU.shape[1]:
            confirmed = torch.cat([self.unread_BU, confirmed], dim=1)
        self._confirmed_BC = confirmed
        return confirmed, self._draft_BK

    def keep(self, tokens: list[int]) -> None:
        """Keeps the first regular columns of the last pass: confirmed tokens and accepted drafts."""
        self.unread_BU = self._draft_BK[:, : max(0, tokens[0] - self._new)]
        self.rows.add(tokens)

    def adopt(self, given: Cache) -> None:
        """Counts the tokens of the given cache, which is the model's own."""
        self.rows.add([int(given.get_seq_length())])

    def give_back(self, given: Cache | None) -> Cache:
        """The model's own cache. It is the one that was passed to `generate`, if any."""
        return self.held


class TextCache(SequenceCache):
    """A row's whole text, for models that read it again in every pass. The model's own cache stays empty."""

    def keep(self, tokens: list[int]) -> None:
        """Keeps the first regular columns of the last pass."""
        accepted = max(0, tokens[0] - self._new)
        self.unread_BU = torch.cat([self._confirmed_BC, self._draft_BK[:, :accepted]], dim=1)
        self.rows.add(tokens)
