"""The rows that are decoded together. They come and go between passes.

Shapes: B batch, T tokens that the model has not read, K drafts.
"""

from dataclasses import dataclass, field

import torch

from ..cache.protocol import DecodingCache
from .drafters.base import Drafts, no_drafts
from .sequence import Sequence

NO_SOURCE = -1


@dataclass
class Batch:
    """Requests, and what the next pass reads of each.

    Args:
        sequences (`list[Sequence]`): The rows.
        cache ([`DecodingCache`]): What the model has read of each.
        unread_BT (`torch.Tensor`): What it has not: ids of shape `(B, T)`, or embeddings `(B, T, E)`, drafts at the
        end.
        drafts ([`Drafts`]): The drafts among these.
        source_of_row (`list[int]`): Number of the drafter that made each row's drafts, -1 for none.
    """

    sequences: list[Sequence]
    cache: DecodingCache
    unread_BT: torch.Tensor
    drafts: Drafts = field(default=None)
    source_of_row: list[int] = field(default=None)

    def __post_init__(self):
        if self.drafts is None:
            self.drafts = no_drafts(len(self.sequences), self.unread_BT.device)
        if self.source_of_row is None:
            self.source_of_row = [NO_SOURCE] * len(self.sequences)

    @property
    def is_done(self) -> bool:
        """Whether no row wants more tokens."""
        return all(sequence.is_finished for sequence in self.sequences)

    @property
    def remaining_tokens(self) -> int:
        """New tokens that may still come in the row where most may."""
        return max(sequence.remaining_tokens for sequence in self.sequences)

    def set_drafts(self, pending_B: torch.LongTensor, drafts: Drafts, source_of_row: list[int]) -> None:
        """Says what the next pass reads: each row's last token, and drafts behind it."""
        self.drafts, self.source_of_row = drafts, source_of_row
        self.unread_BT = torch.cat([pending_B[:, None], drafts.token_BK.clamp(min=0)], dim=1)

    def admit(self, other: "Batch") -> None:
        """Adds rows whose prompts were read. Their cache must be a [`RollbackCache`], as this one is."""
        device = self.unread_BT.device
        pending_B = torch.cat([self.unread_BT[:, 0], other.unread_BT[:, 0].to(device)])
        self.cache.append_rows(other.cache)
        self.sequences = self.sequences + other.sequences
        self.set_drafts(pending_B, self.drafts.with_rows(other.drafts), self.source_of_row + other.source_of_row)

    def retire(self) -> list[Sequence]:
        """Drops rows that want no more tokens, but never the last row, and returns them."""
        alive = [index for index, row in enumerate(self.sequences) if not row.is_finished]
        if not alive or len(alive) == len(self.sequences):
            return []
        retired = [row for row in self.sequences if row.is_finished]
        self.cache.select_rows(alive)
        self.sequences = [self.sequences[index] for index in alive]
        self.source_of_row = [self.source_of_row[index] for index in alive]
        self.drafts, self.unread_BT = self.drafts.select_rows(alive), self.unread_BT[alive]
        return retired
