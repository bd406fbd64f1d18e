"""Sends new tokens to a streamer as plain decoding does: one token of every row at a time."""

import torch
from transformers.generation.streamers import BaseStreamer

from .sequence import Sequence


class PassStreamer(BaseStreamer):
    """A streamer that is also told where each forward pass ends, so that it knows which tokens came together."""

    def end_pass(self) -> None:
        """Called after the tokens of each pass."""
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

    def send(self) -> None:
        """Sends the tokens of all positions that every unfinished row has reached."""
        if self.streamer is None:
            return
        lengths = [row.new_tokens for row in self.sequences]
        waiting = [row.new_tokens for row in self.sequences if not row.is_finished]
        while self.sent < (min(waiting) if waiting else max(lengths)):
            self.streamer.put(torch.tensor([self._token(row) for row in self.sequences]))
            self.sent += 1
        if isinstance(self.streamer, PassStreamer):
            self.streamer.end_pass()

    def end(self) -> None:
        """Ends the stream."""
        if self.streamer is not None:
            self.streamer.end()

    def _token(self, row: Sequence) -> int:
        return int(row.ids_S[row.prompt + self.sent]) if self.sent < row.new_tokens else self.pad_token
