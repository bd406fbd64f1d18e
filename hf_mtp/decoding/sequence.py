"""One request while it is decoded: its tokens, its records, and everything else that belongs to this row alone."""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessorList

from .noise import PositionNoise

MOST_RESERVED = 2**16  # new tokens that storage is reserved for; it grows if there are more


@dataclass
class TokenRecord:
    """The data that the user requested about one new token.

    Args:
        score, logits (`torch.Tensor` of shape `(V,)`): Scores after and logits before the logits processors.
        hidden_states (`tuple` of `torch.Tensor` of shape `(Q, D)` or `(A, Q, D)`), attentions (of shape `(H, Q, S)`):
            Per layer, for the Q tokens that plain decoding reads before this one: the prompt at first, then one token
            at a time.
    """

    score: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class Sequence:
    """A row of a batch.

    Args:
        prompt_S (`torch.LongTensor` of shape `(S,)`): The prompt, with padding at its left.
        row (`int`): Number of the row in its call.
        padding (`int`): Number of columns of padding.
        max_new_tokens (`int`): Most new tokens.
        config ([`~transformers.GenerationConfig`]): Tells what to record.
        processors ([`~transformers.LogitsProcessorList`]): The processors for this row alone.
        noise ([`PositionNoise`], *optional*): Noise for sampling; greedy decoding if `None`.

    Attributes:
        is_stopped (`bool`): Whether a stopping criterion was met.
        is_finished (`bool`): Whether the row gets no more tokens. A stopped row may go on until all rows have stopped.
        new_tokens (`int`): Number of new tokens so far.
    """

    def __init__(
        self,
        prompt_S: torch.LongTensor,
        row: int,
        padding: int,
        max_new_tokens: int,
        config: GenerationConfig,
        processors: LogitsProcessorList,
        noise: PositionNoise | None = None,
    ):
        self.row, self.padding, self.prompt = row, padding, len(prompt_S)
        self.ids_S = torch.cat([prompt_S, prompt_S.new_zeros(min(max_new_tokens, MOST_RESERVED))])
        self.max_new_tokens, self.new_tokens = max_new_tokens, 0
        self.is_stopped = self.is_finished = False
        self.processors, self.noise = processors, noise
        wants = config.return_dict_in_generate
        self.keeps_scores = bool(wants and config.output_scores)
        self.keeps_logits = bool(wants and config.output_logits)
        self.records: list[TokenRecord] = []

    @property
    def remaining_tokens(self) -> int:
        """The most new tokens that the row may still get."""
        return self.max_new_tokens - self.new_tokens

    @property
    def ids_1S(self) -> torch.LongTensor:
        """`(1, S + n)`: prompt and new tokens."""
        return self.ids_S[None, : self.prompt + self.new_tokens]

    @property
    def text(self) -> list[int]:
        """Prompt and new tokens as a list, without padding."""
        return self.ids_S[self.padding : self.prompt + self.new_tokens].tolist()

    def append(self, token_n: torch.LongTensor, logits_nV: torch.Tensor | None, score_nV: torch.Tensor | None) -> None:
        """Adds n tokens, with their logits and scores."""
        start = self.prompt + self.new_tokens
        if start + len(token_n) > len(self.ids_S):
            self.ids_S = torch.cat([self.ids_S, torch.zeros_like(self.ids_S), torch.zeros_like(token_n)])
        self.ids_S[start : start + len(token_n)] = token_n
        self.new_tokens += len(token_n)
        if self.noise is not None:
            self.noise.forget_before(self.new_tokens)
        for index in range(len(token_n)):
            self.records.append(
                TokenRecord(
                    score=score_nV[index].float() if self.keeps_scores else None,
                    logits=logits_nV[index].float() if self.keeps_logits else None,
                )
            )

    def finish(self) -> None:
        """Marks the row as stopped and finished."""
        self.is_stopped = self.is_finished = True

    def record_states(self, start: int, states: list[dict]) -> None:
        """Adds hidden states and attentions to the records from number `start` on, one entry per token."""
        for record, entry in zip(self.records[start:], states, strict=False):
            for name, value in entry.items():
                setattr(record, name, value)


def padded_ids(sequences: list[Sequence], pad_token: int) -> torch.LongTensor:
    """`(B, S + n)`: the ids of all rows, padded on the right to the longest.

    Args:
        sequences (`list[Sequence]`): Rows whose prompts are equally long.
        pad_token (`int`): The token used to pad shorter rows.
    """
    rows = [sequence.ids_1S[0] for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token)


def stacked_records(sequences: list[Sequence], name: str) -> tuple | None:
    """A field of the records in the shape that `generate` returns, with zeros for rows that ended.

    Returns:
        `tuple` per token of `torch.Tensor` of shape `(B, ...)`, or of a tuple of these per layer; `None` if the field
        was not requested.
    """
    columns = [[getattr(record, name) for record in sequence.records] for sequence in sequences]
    longest = max(columns, key=len)
    if not longest or longest[0] is None:
        return None
    dim = -3 if name == "hidden_states" else 0  # some models have several states per token, before the rows
    return tuple(
        _stack([column[token] if token < len(column) else None for column in columns], dim)
        for token in range(len(longest))
    )


def _stack(rows: list, dim: int):
    """Stacks tensors, or tuples of tensors, over rows. Missing rows are zeros."""
    there = [row for row in rows if row is not None]
    if isinstance(there[0], tuple):
        layers = range(len(there[0]))
        return tuple(_stack([None if row is None else row[layer] for row in rows], dim) for layer in layers)
    return torch.stack([torch.zeros_like(there[0]) if row is None else row for row in rows], dim=dim)
