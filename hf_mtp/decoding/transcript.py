"""The growing outputs of a batch, row by row, and what `generate` can be asked to return about each token."""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig


@dataclass
class TokenRecord:
    """What was asked for about one new token.

    Args:
        score, logits (`torch.Tensor` of shape `(V,)`): After and before the logits processors.
        hidden_states (`tuple` of `torch.Tensor` of shape `(Q, D)`), attentions (of shape `(H, Q, S)`): Per layer, of
            the Q tokens that the pass had to read before it could choose this one: the prompt, then one at a time.
    """

    score: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class Transcript:
    """Prompts and new tokens of B rows.

    Args:
        input_ids_BS (`torch.LongTensor` of shape `(B, S)`): The prompts, padded on the left.
        room (`int`): New tokens at most.
        config ([`~transformers.GenerationConfig`]): Says what to record.
    """

    def __init__(self, input_ids_BS: torch.LongTensor, room: int, config: GenerationConfig):
        batch, self.prompt = input_ids_BS.shape
        pad_token = getattr(config, "_pad_token_tensor", None)  # fills up rows that end before others
        empty = input_ids_BS.new_full((batch, room), 0 if pad_token is None else int(pad_token))
        self.sequence_BS = torch.cat([input_ids_BS, empty], dim=1)
        self.room = room
        self.new_tokens = [0] * batch
        self.finished = [False] * batch
        wants = config.return_dict_in_generate
        self.keeps_scores = bool(wants and config.output_scores)
        self.keeps_logits = bool(wants and config.output_logits)
        self.records: list[list[TokenRecord]] = [[] for _ in range(batch)]

    def __len__(self) -> int:
        """B."""
        return len(self.new_tokens)

    def prefix(self, row: int) -> torch.LongTensor:
        """`(1, S + n)`: a row's prompt and new tokens."""
        return self.sequence_BS[row : row + 1, : self.prompt + self.new_tokens[row]]

    def room_of(self, row: int) -> int:
        """New tokens that a row may still get."""
        return self.room - self.new_tokens[row]

    def append(
        self, row: int, token_n: torch.LongTensor, logits_nV: torch.Tensor | None, score_nV: torch.Tensor | None
    ) -> None:
        """Adds n tokens to a row, with their logits and scores."""
        start = self.prompt + self.new_tokens[row]
        self.sequence_BS[row, start : start + len(token_n)] = token_n
        self.new_tokens[row] += len(token_n)
        for index in range(len(token_n)):
            self.records[row].append(
                TokenRecord(
                    score=score_nV[index] if self.keeps_scores else None,
                    logits=logits_nV[index] if self.keeps_logits else None,
                )
            )

    def record_states(self, row: int, start: int, states: list[dict]) -> None:
        """Adds hidden states and attentions to a row's tokens from number `start` on, one entry per token."""
        for record, entry in zip(self.records[row][start:], states, strict=False):
            for name, value in entry.items():
                setattr(record, name, value)

    def finish(self, row: int) -> None:
        self.finished[row] = True

    def scores_of(self, row: int) -> tuple[torch.Tensor, ...] | None:
        """What a stopping criterion is shown."""
        return tuple(record.score[None] for record in self.records[row]) if self.keeps_scores else None

    @property
    def sequences(self) -> torch.LongTensor:
        """`(B, S + n)`: all rows, filled up to the longest."""
        return self.sequence_BS[:, : self.prompt + max(self.new_tokens)]

    def stacked(self, name: str) -> tuple | None:
        """A field of the records in the shape that `generate` gives: per token, over rows; zeros for rows that ended.

        Returns:
            `tuple` per token of `torch.Tensor` of shape `(B, ...)`, or of a tuple of these per layer; `None` if not
            asked for.
        """
        columns = [[getattr(record, name) for record in records] for records in self.records]
        longest = max(columns, key=len)
        if not longest or longest[0] is None:
            return None
        return tuple(
            _stack([column[token] if token < len(column) else None for column in columns])
            for token in range(len(longest))
        )


def _stack(rows: list):
    """Stacks tensors, or tuples of tensors, over rows; missing rows are zeros."""
    there = next(row for row in rows if row is not None)
    if isinstance(there, tuple):
        return tuple(_stack([None if row is None else row[layer] for row in rows]) for layer in range(len(there)))
    return torch.stack([torch.zeros_like(there) if row is None else row for row in rows])
