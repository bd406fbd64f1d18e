"""Verifies rows of different requests in one batch, each by its own processors, criteria and noise.

Rows with equal rules are verified together. So a batch of greedy requests is verified as `generate` verifies it.

Shapes: B batch, C candidates.
"""

from collections.abc import Hashable
from dataclasses import dataclass, fields, replace

import torch
from transformers import LogitsProcessorList

from ..decoding.batch import Batch
from ..decoding.drafters.masks import SHORTLIST_WARPERS
from ..decoding.outcome import Verified
from ..decoding.processors import Order
from ..decoding.sequence import Sequence
from ..decoding.verifier import Verifier
from ..passes.decoding_pass import PassOutput


@dataclass(frozen=True)
class Rules:
    """How the tokens of one request are verified.

    Args:
        verifier ([`Verifier`]): The verifier of a batch of this row alone, which never needs other rows in step.
        key (`Hashable`): Equal for rows that may be verified by one another's verifier.
    """

    verifier: Verifier
    key: Hashable

    @classmethod
    def of(cls, verifier: Verifier, samples: bool) -> "Rules":
        """The rules of a request.

        Args:
            verifier ([`Verifier`]): Its verifier.
            samples (`bool`): Whether the request samples.
        """
        settings = [(type(p), *sorted(vars(p).items())) for p in verifier.processors]
        is_plain = all(isinstance(value, int | float | str | None) for _, *items in settings for _, value in items)
        if verifier.order is not Order.TOGETHER or verifier.clocks or not is_plain:
            return cls(verifier, id(verifier))
        return cls(verifier, (samples, tuple(settings), frozenset(verifier.ends)))

    @property
    def warpers(self) -> LogitsProcessorList:
        """The processors that also work on a shortlist of tokens."""
        return LogitsProcessorList(p for p in self.verifier.processors if type(p) in SHORTLIST_WARPERS)


class RowVerifier:
    """A [`Verifier`] of rows with rules of their own. The loop and its drafter of masks share one.

    Attributes:
        rules (`dict[Sequence, Rules]`): The rules of all rows that are decoded.
        errors (`dict[Sequence, Exception]`): The errors of rows that were finished because their rules failed.
    """

    keeps_rows_in_step, pad_token = False, None
    processors = LogitsProcessorList()  # none that all rows share

    def __init__(self):
        self.rules: dict[Sequence, Rules] = {}
        self.errors: dict[Sequence, Exception] = {}
        self._groups: list[tuple[Rules, list[int]]] = []

    def __call__(self, batch: Batch, output: PassOutput) -> Verified:
        """Verifies the drafts of a pass. Arguments are those of [`Verifier`].

        If the rules of some rows fail, such as a penalty that makes scores infinite, only these rows are finished.

        Raises:
            Exception: The rules of all rows fail.
        """
        self._groups = self._grouped(batch.sequences)
        if len(self._groups) == 1:
            return self._groups[0][0].verifier(batch, output)
        parts = [
            self._verified(rules, _rows_of(batch, rows), _output_of(output, rows)) for rules, rows in self._groups
        ]
        return _in_order(parts, [row for _, rows in self._groups for row in rows])

    def warp(self, _, score_BC: torch.Tensor) -> torch.Tensor:
        """Applies each row's own temperature, top-k and top-p to scores of drafts for the rows of the latest pass."""
        warped = score_BC.clone()
        for rules, rows in self._groups:
            if rules.warpers:
                warped[rows] = rules.warpers(None, score_BC[rows])
        return warped

    def _verified(self, rules: Rules, batch: Batch, output: PassOutput) -> Verified:
        try:
            return rules.verifier(batch, output)
        except Exception as error:  # of any processor or criterion
            for row in batch.sequences:
                self.errors[row] = error
                row.finish()
            return _nothing_new(batch)

    def _grouped(self, sequences: list[Sequence]) -> list[tuple[Rules, list[int]]]:
        """The rows of a batch, grouped by equal rules."""
        groups: dict[Hashable, tuple[Rules, list[int]]] = {}
        for index, sequence in enumerate(sequences):
            rules = self.rules[sequence]
            groups.setdefault(rules.key, (rules, []))[1].append(index)
        return list(groups.values())


def _rows_of(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch, to be verified. The cache is that of the whole batch."""
    sequences = [batch.sequences[row] for row in rows]
    return Batch(sequences, batch.cache, batch.unread_BT[rows], batch.drafts.select_rows(rows))


def _output_of(output: PassOutput, rows: list[int]) -> PassOutput:
    return replace(output, logits_BRV=output.logits_BRV[rows])


def _nothing_new(batch: Batch) -> Verified:
    """The result for rows that get no token."""
    rows, pending_B = len(batch.sequences), batch.unread_BT[:, -1 - batch.drafts.count]
    columns = None if batch.drafts.parent_BK is None else [[0] for _ in range(rows)]
    anchor_B, none = torch.zeros_like(pending_B), [0] * rows
    return Verified([[] for _ in range(rows)], none, none, pending_B, anchor_B, [True] * rows, columns)


def _in_order(parts: list[Verified], rows: list[int]) -> Verified:
    """Joins the results for groups of rows. `rows` are the numbers of their rows in the batch."""
    place_of = sorted(range(len(rows)), key=rows.__getitem__)
    joined = {}
    for field in fields(Verified):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], torch.Tensor):
            joined[field.name] = torch.cat(values)[place_of]
        elif values[0] is not None:
            every = [value for part in values for value in part]
            joined[field.name] = [every[place] for place in place_of]
    return Verified(**joined)
