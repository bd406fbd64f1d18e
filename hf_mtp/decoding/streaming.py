"""Sends new tokens to a streamer as plain decoding does: one token of every row at a time."""

from typing import NamedTuple

import torch
from transformers.generation.streamers import BaseStreamer

from .batch import Batch
from .drafters.base import NO_TOKEN
from .sequence import Sequence


class PassStreamer(BaseStreamer):
    """A streamer that is also told where each forward pass ends, so that it knows which tokens came together."""

    def end_pass(self) -> None:
        """Called after the tokens of each pass."""
        raise NotImplementedError


class DraftToken(NamedTuple):
    """A draft as a streamer gets it.

    Args:
        token (`int`): Its id.
        parent (`int`): What it follows: 0 is the row's last token, and i is the i-th draft of the same list.
    """

    token: int
    parent: int


class DraftStreamer(PassStreamer):
    """A streamer that is also given the drafts, before the next forward pass verifies them."""

    def put_drafts(self, drafts: list[list[DraftToken]], forward_passes: int) -> None:
        """Called after [`~PassStreamer.end_pass`] of each pass.

        The next pass accepts the longest run of drafts, each the parent of the next, that equals the tokens it gives.

        Args:
            drafts (`list[list[DraftToken]]`): For each row of the call, the drafts that the next pass verifies.
                Parents come before their children.
            forward_passes (`int`): Forward passes of the call so far.
        """
        raise NotImplementedError


class RowStream:
    """The stream of a call. Rows advance at different speeds, so it sends a position once all rows have reached it.

    Args:
        streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*): Nothing is sent if `None`.
        sequences (`list[Sequence]`): All rows of the call.
        pad_token (`int`): The token that is sent for rows that ended before others.
    """

    def __init__(self, streamer: BaseStreamer | None, sequences: list[Sequence], pad_token: int):
        self.streamer, self.sequences, self.pad_token, self.sent = streamer, sequences, pad_token, 0

    def send(self, batch: Batch, forward_passes: int) -> None:
        """Sends the tokens of all positions that every unfinished row has reached, and the next drafts.

        Args:
            batch ([`Batch`]): The rows that are decoded now, after a pass.
            forward_passes (`int`): Forward passes of the call so far.
        """
        if self.streamer is None:
            return
        lengths = [row.new_tokens for row in self.sequences]
        waiting = [row.new_tokens for row in self.sequences if not row.is_finished]
        while self.sent < (min(waiting) if waiting else max(lengths)):
            self.streamer.put(torch.tensor([self._token(row) for row in self.sequences], device="cpu"))
            self.sent += 1
        if isinstance(self.streamer, PassStreamer):
            self.streamer.end_pass()
        if isinstance(self.streamer, DraftStreamer):
            self.streamer.put_drafts(self._drafts(batch), forward_passes)

    def end(self) -> None:
        """Ends the stream."""
        if self.streamer is not None:
            self.streamer.end()

    def _drafts(self, batch: Batch) -> list[list[DraftToken]]:
        parents = batch.drafts.parents_BK.tolist()
        pairs = [zip(*row, strict=True) for row in zip(batch.drafts.tokens, parents, strict=True)]
        # Places without a draft are at the end of a row.
        drafts = [[DraftToken(token, parent) for token, parent in row if token != NO_TOKEN] for row in pairs]
        of_row = {row.row: known for row, known in zip(batch.sequences, drafts, strict=True) if not row.is_finished}
        return [of_row.get(row.row, []) for row in self.sequences]

    def _token(self, row: Sequence) -> int:
        return int(row.ids_S[row.prompt + self.sent]) if self.sent < row.new_tokens else self.pad_token
