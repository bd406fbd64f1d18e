"""The rows that are decoded together. Rows are admitted and retired between passes.

Knows requests, their cache and their drafts. Knows nothing of models or of how drafts are made.

Shapes: B batch, T tokens that the model has not read, K drafts, E embedding size.
"""

from dataclasses import dataclass, field

import torch

from ..cache.protocol import DecodingCache
from .drafters.base import Drafts, no_drafts
from .outcome import Origin
from .sequence import Sequence


@dataclass
class Batch:
    """Requests, and the tokens of each that the next pass reads.

    Args:
        sequences (`list[Sequence]`): The rows.
        cache ([`DecodingCache`]): The tokens of each row that the model has read.
        unread_BT (`torch.Tensor`): The tokens that the next pass reads, with the drafts at the end: ids of shape
            `(B, T)`, or embeddings of shape `(B, T, E)`.
        drafts ([`Drafts`], *optional*): The drafts among these; none if `None`.
        origins (`list[list[Origin]]`, *optional*): Where the drafts of each row come from.
    """

    sequences: list[Sequence]
    cache: DecodingCache
    unread_BT: torch.Tensor
    drafts: Drafts = field(default=None)
    origins: list[list[Origin]] = field(default=None)

    def __post_init__(self):
        if self.drafts is None:
            self.drafts = no_drafts(len(self.sequences), self.unread_BT.device)
        if self.origins is None:
            self.origins = [[] for _ in self.sequences]

    @property
    def is_done(self) -> bool:
        """Whether all rows are finished."""
        return all(sequence.is_finished for sequence in self.sequences)

    @property
    def remaining_tokens(self) -> int:
        """The largest number of new tokens that any row may still get."""
        return max(sequence.remaining_tokens for sequence in self.sequences)

    def set_drafts(self, pending_B: torch.LongTensor, drafts: Drafts, origins: list[list[Origin]]) -> None:
        """Sets what the next pass reads: each row's pending token, and drafts after it."""
        self.drafts, self.origins = drafts, origins
        self.unread_BT = torch.cat([pending_B[:, None], drafts.token_BK.clamp(min=0)], dim=1)

    def read_again(self) -> None:
        """Empties the cache, so that the next pass reads the whole texts, which are equally long, and no drafts."""
        self.cache.keep([-length for length in self.cache.rows.lengths])
        self.unread_BT = torch.cat([sequence.ids_1S for sequence in self.sequences])
        self.drafts = no_drafts(len(self.sequences), self.unread_BT.device)
        self.origins = [[] for _ in self.sequences]

    def admit(self, other: "Batch") -> None:
        """Adds rows whose prompts have been read. Both caches must be a growing [`RollbackCache`].

        Args:
            other ([`Batch`]): The rows after their prefill.
        """
        device = self.unread_BT.device
        pending_B = torch.cat([self.unread_BT[:, 0], other.unread_BT[:, 0].to(device)])
        self.cache.append_rows(other.cache)
        self.sequences = self.sequences + other.sequences
        self.set_drafts(pending_B, self.drafts.with_rows(other.drafts), self.origins + other.origins)

    def retire(self) -> list[Sequence]:
        """Drops and returns finished rows, unless all rows are finished."""
        alive = [index for index, row in enumerate(self.sequences) if not row.is_finished]
        if not alive or len(alive) == len(self.sequences):
            return []
        retired = [row for row in self.sequences if row.is_finished]
        self.cache.select_rows(alive)
        self.sequences = [self.sequences[index] for index in alive]
        self.origins = [self.origins[index] for index in alive]
        self.drafts, self.unread_BT = self.drafts.select_rows(alive), self.unread_BT[alive]
        return retired
