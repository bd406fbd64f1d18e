"""Decoding for models that read plain sequences only, and keep a state that cannot be rolled back.

If the model goes on from its cache by several tokens at a time, a step reads what is certain into that cache, and
drafts and masks into a copy, which is then dropped. That takes two calls of the model; accepted drafts are read a
second time, with the next step. If it does not, a step reads the whole text again.

Shapes: one row; T regular columns, K drafts, M masks, R = K + 1 positions with logits, D features.
"""

import torch
from transformers import Cache

from ..adapter.gate import Listener
from ..base.cache import Rows, cache_name, copied
from ..blocks.layout import BlockLayout
from .step import MaskedStep, StepOutput


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
        if self.unread_BU is not None and self.unread_BU.shape[1]:
            certain = torch.cat([self.unread_BU, certain], dim=1)
        self._certain_BC = certain
        return certain, self._guesses_BK

    def keep(self, tokens: list[int]) -> None:
        """Counts in the first regular columns of the last pass: what was certain, and accepted drafts."""
        self.unread_BU = self._guesses_BK[:, : max(0, tokens[0] - self._certain)]
        self.rows.add(tokens)

    def take_over(self, cache: Cache) -> None:
        """Starts with the tokens of `cache`, which is the model's own."""
        self.rows.add([int(cache.get_seq_length())])

    def hand_over(self, cache: Cache) -> None:
        """Nothing: it is the very cache that `generate` was given."""


class SequenceStep(MaskedStep):
    """The forward pass of a model that reads one plain sequence at a time."""

    def __init__(self, tuner, **kwargs):
        super().__init__(tuner, **kwargs)
        if self.outputs:
            raise NotImplementedError(
                f"`{next(iter(self.outputs))}` with `mtp=True`: {type(self.model).__name__} reads what is certain and "
                "what is drafted in calls of their own. Leave it out, or decode with mtp=False."
            )

    def __call__(
        self, regular_BT: torch.Tensor, layout: BlockLayout, cache: SequenceCache, logits_rows: int
    ) -> StepOutput:
        """Reads all columns. Arguments as in [`MaskedStep`]; the masks hang on the last regular token."""
        drafts, past = logits_rows - 1, list(cache.lengths)
        start = cache.read
        certain, guesses_BK = cache.split(regular_BT, drafts)
        outputs, listener = self._read(certain, start, cache.held, cache.rows, logits_to_keep=1)
        cache.held = outputs[cache_name(outputs)]
        logits, masks_BMD, calls = [outputs.logits[:, -1:]], listener.states[:, :0], 1
        if drafts or layout.masks:
            mask_ids = layout.index_BM + self.tuner.vocab_size
            with self.tuner.masks_in_columns(drafts, layout.index_BM):
                outputs, listener = self._read(
                    torch.cat([guesses_BK, mask_ids], dim=1), start + certain.shape[1], copied(cache.held), cache.rows
                )
            logits.append(outputs.logits[:, :drafts])
            masks_BMD, calls = listener.states[:, drafts:], 2
        return StepOutput(torch.cat(logits, dim=1), masks_BMD, regular_BT.shape[1] - logits_rows, past, calls=calls)

    def catch_up(self, cache: SequenceCache) -> None:
        """Reads what the model's own cache lacks."""
        if cache.unread_BU is not None and cache.unread_BU.shape[1]:
            outputs, _ = self._read(cache.unread_BU, cache.read, cache.held, cache.rows, logits_to_keep=1)
            cache.held, cache.unread_BU = outputs[cache_name(outputs)], None

    def _read(
        self, sequence_BN: torch.Tensor, start: int, held: Cache | None, rows: Rows, **options
    ) -> tuple[object, Listener]:
        """One call of the model over a sequence, ids or embeddings, that goes on from `start` tokens in a cache."""
        columns = sequence_BN.shape[1]
        position_1N = torch.arange(start, start + columns, device=sequence_BN.device)[None]
        inputs = {
            "inputs_embeds" if sequence_BN.dim() == 3 else "input_ids": sequence_BN,
            "position_ids": rows.positions_of(position_1N),
            cache_name(self.known_arguments): held,
            "use_cache": True,
            **options,
        }
        inputs = {name: value for name, value in inputs.items() if name in self.known_arguments}
        with self.tuner.gate.listen() as listener:
            return self.model(**inputs), listener


class WholeTextCache(SequenceCache):
    """A row's whole text; the model's own cache stays empty until the end."""

    def keep(self, tokens: list[int]) -> None:
        """Counts in the first regular columns of the last pass."""
        accepted = max(0, tokens[0] - self._certain)
        self.unread_BU = torch.cat([self._certain_BC, self._guesses_BK[:, :accepted]], dim=1)
        self.rows.add(tokens)


class WholeTextStep(SequenceStep):
    """The forward pass of a model that cannot go on from a cache by more than one token."""

    def __call__(
        self, regular_BT: torch.LongTensor, layout: BlockLayout, cache: WholeTextCache, logits_rows: int
    ) -> StepOutput:
        """Reads the text from its start. Arguments as in [`MaskedStep`]."""
        past = list(cache.lengths)
        certain, guesses_BK = cache.split(regular_BT, logits_rows - 1)
        text = torch.cat([certain, guesses_BK, layout.index_BM + self.tuner.vocab_size], dim=1)
        tokens = text.shape[1] - layout.masks
        with self.tuner.masks_in_columns(tokens, layout.index_BM):
            wanted = logits_rows + layout.masks
            outputs, listener = self._read(text, 0, None, cache.rows, use_cache=False, logits_to_keep=wanted)
        logits_BRV = outputs.logits[:, -wanted:][:, :logits_rows]
        return StepOutput(logits_BRV, listener.states[:, tokens:], regular_BT.shape[1] - logits_rows, past)
