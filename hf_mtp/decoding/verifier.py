"""Applies verification to a batch: decides which tokens of a pass each row keeps.

Shapes: B batch, K drafts, R = K + 1 positions.
"""

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import MaxTimeCriteria

from ..passes.decoding_pass import PassOutput
from .batch import Batch
from .outcome import Verified
from .processors import Order, end_tokens_of, has_end_token, order_of
from .sequence import Sequence
from .verification import noise_of, refuse_undrawn, verify_in_order, verify_together


class Verifier:
    """Extends the rows of a batch by the tokens that verification accepts.

    Args:
        processors ([`~transformers.LogitsProcessorList`]), criteria ([`~transformers.StoppingCriteriaList`]): As
            `generate` prepared them.
        rows (`int`): Number of rows of the call.
        pad_token (`int`): The token used to pad rows that ended.
        in_step (`bool`, *optional*, defaults to `False`): Whether the rows must advance equally in any case.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        rows: int,
        pad_token: int = 0,
        in_step: bool = False,
    ):
        self.processors, self.criteria = processors, criteria
        self.order = Order.IN_STEP if in_step else order_of(processors, criteria, rows)
        self.ends = end_tokens_of(criteria)
        self.pad_token = pad_token if has_end_token(criteria) else None
        self.clocks = [criterion for criterion in criteria if type(criterion) is MaxTimeCriteria]

    @property
    def keeps_rows_in_step(self) -> bool:
        """Whether all rows must advance equally, and stay in the batch to the end."""
        return self.order is Order.IN_STEP

    def __call__(self, batch: Batch, output: PassOutput) -> Verified:
        """Verifies the drafts of a pass.

        Args:
            batch ([`Batch`]): Its sequences are extended in place.
            output ([`PassOutput`]): The results of the pass.

        Raises:
            FloatingPointError: The hidden states of masks are not finite.
            RuntimeError: No token can be sampled.
        """
        before = [row.new_tokens for row in batch.sequences]
        verified = (self._together if self.order is Order.TOGETHER else self._in_order)(batch, output)
        if any(bool(clock(batch.sequences[0].ids_1S, None).all()) for clock in self.clocks):
            for row in batch.sequences:
                row.finish()
        for index, row in enumerate(batch.sequences):
            path = None if verified.columns is None else verified.columns[index]
            row.record_states(before[index], output.states_of_row(index, path))
        return verified

    def _together(self, batch: Batch, output: PassOutput) -> Verified:
        drafts, logits_BRV = batch.drafts, output.logits_BRV
        noise_BRV = noise_of(batch.sequences, 1 + drafts.count)
        token_BR, accepted_B, path_BR, score_BRV = verify_together(logits_BRV, drafts, noise_BRV, self.processors)
        is_finite_B = output.masks_are_finite.expand_as(accepted_B)
        numbers = torch.stack([accepted_B, drafts.offered_B, is_finite_B.long()], dim=1)
        paths = [] if path_BR is None else [path_BR]
        if path_BR is not None:
            token_BR = token_BR.gather(1, path_BR)
        read = torch.cat([token_BR, numbers, *paths], dim=1).tolist()  # the only time that the host waits
        columns, tokens, accepted, had_ended = [], [], [], [row.is_finished for row in batch.sequences]
        width = token_BR.shape[1]
        for index, (row, values) in enumerate(zip(batch.sequences, read, strict=True)):
            right, _, is_finite = values[width : width + 3]
            _refuse_nonfinite(is_finite)
            row_tokens = self._cut(row, values[: right + 1])
            refuse_undrawn(row_tokens)
            path = values[width + 3 :]
            here = index, path[: len(row_tokens)] if paths else slice(len(row_tokens))
            row.append(token_BR[index, : len(row_tokens)], logits_BRV[here], score_BRV[here])
            tokens.append(row_tokens)
            accepted.append(min(right, len(row_tokens)))
            columns.append(path[: 1 + accepted[-1]])
        pending_B = token_BR.gather(1, accepted_B[:, None])[:, 0]
        anchor_B = accepted_B if path_BR is None else path_BR.gather(1, accepted_B[:, None])[:, 0]
        offered = [values[width + 1] for values in read]
        return Verified(tokens, offered, accepted, pending_B, anchor_B, had_ended, columns if paths else None)

    def _cut(self, row: Sequence, tokens: list[int]) -> list[int]:
        """Cuts tokens after the first one that ends the row, and finishes the row there."""
        if row.is_finished:
            return []
        tokens = tokens[: row.remaining_tokens]
        end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        if end is not None:
            tokens = tokens[: end + 1]
        if end is not None or len(tokens) == row.remaining_tokens:
            row.finish()
        return tokens

    def _in_order(self, batch: Batch, output: PassOutput) -> Verified:
        _refuse_nonfinite(bool(output.masks_are_finite))
        rows, drafts = batch.sequences, batch.drafts
        groups = [list(range(len(rows)))] if self.keeps_rows_in_step else [[index] for index in range(len(rows))]
        before, had_ended = [row.new_tokens for row in rows], [row.is_finished for row in rows]
        columns: list[list[int]] = [[] for _ in rows]
        for group in groups:
            if all(rows[index].is_finished for index in group):
                continue
            found = verify_in_order(
                [rows[index] for index in group],
                output.logits_BRV[group],
                drafts.select_rows(group),
                self.processors if self.keeps_rows_in_step else rows[group[0]].processors,
                self.criteria,
                self.pad_token,
            )
            for index, visited in zip(group, found, strict=True):
                columns[index] = visited
        tokens = [row.ids_1S[0, row.prompt + start :].tolist() for row, start in zip(rows, before, strict=True)]
        kept = [visited[: len(new)] for visited, new in zip(columns, tokens, strict=True)]
        device = drafts.token_BK.device
        return Verified(
            tokens,
            drafts.offered_B.tolist(),
            [max(0, len(visited) - 1) for visited in columns],
            torch.cat([row.ids_1S[0, -1:] for row in rows]).to(device),
            torch.tensor([visited[-1] if visited else 0 for visited in kept], device=device),
            had_ended,
            None if drafts.parent_BK is None else columns,
        )


def _refuse_nonfinite(is_finite: bool) -> None:
    if not is_finite:
        raise FloatingPointError(
            "The adapter computes hidden states that are NaN or infinite, which would also change those of the base "
            "model. Its weights are broken, or too large for this dtype. Load the model in bfloat16 or float32, or "
            "decode with mtp=False."
        )
