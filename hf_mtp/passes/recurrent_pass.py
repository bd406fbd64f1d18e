"""Forward passes for models that read plain sequences only and keep a state that cannot be rolled back.

If the model can continue from its cache with several tokens at a time, a step processes confirmed tokens with that
cache, and drafts and masks with a copy that is discarded afterwards. That takes two calls of the model, and accepted
drafts are processed again in the next step. Other models recompute the whole sequence in each step.

Shapes: one row; T regular columns, K drafts, M masks, R = K + 1 positions with logits, D features.
"""

import torch
import torch.nn.functional as F
from transformers import Cache

from ..adapter.gate import HiddenStateCapture
from ..base.caches import cache_name, copied
from ..base.inspection import accepted_inputs
from ..cache.rows import Rows
from ..cache.sequence import SequenceCache, TextCache
from ..layout.blocks import BlockLayout
from .decoding_pass import DecodingPass, PassOutput


class RecurrentPass(DecodingPass):
    """The forward pass of a model that reads one plain sequence at a time."""

    def __call__(
        self, regular_BT: torch.Tensor, layout: BlockLayout, cache: SequenceCache, logits_rows: int
    ) -> PassOutput:
        """Reads all columns. Arguments as in [`DecodingPass`]. All masks hang on the last regular token."""
        drafts, past = logits_rows - 1, cache.rows.lengths
        start = cache.read
        confirmed, draft_BK = cache.split(regular_BT, drafts)
        end = start + confirmed.shape[1]
        outputs, captured = self._read(confirmed, start, cache.held, cache.rows, logits_to_keep=1)
        cache.held = outputs[cache_name(outputs)]
        logits, masks_BMD = [outputs.logits[:, -1:]], captured.states[:, :0]
        read = [(outputs, slice(drafts - regular_BT.shape[1], None), end)]
        if drafts or layout.masks:
            mask_ids = layout.index_BM + self.tuner.vocab_size
            with self.tuner.masks_in_columns(drafts, layout.index_BM, self.prepared_lora(regular_BT.device)):
                outputs, captured = self._read(
                    torch.cat([draft_BK, mask_ids], dim=1), end, copied(cache.held), cache.rows
                )
            logits.append(outputs.logits[:, :drafts])
            masks_BMD = captured.states[:, drafts:]
            read.append((outputs, slice(drafts), end + drafts + layout.masks))
        before, states = regular_BT.shape[1] - logits_rows, self._states(read)
        return PassOutput(torch.cat(logits, dim=1), masks_BMD, before, past, calls=len(read), **states)

    def _states(self, read: list[tuple[object, slice, int]]) -> dict[str, tuple]:
        """Joins the hidden states and attentions of consecutive calls, if they were requested.

        Args:
            read (`list`): For each call, its outputs, the columns to return, and where the call ends in the text.
        """
        end = max(last for *_, last in read)
        calls = {
            name: [
                [_over_text(state, last, end)[..., wanted, :] for state in getattr(outputs, name)]
                for outputs, wanted, last in read
            ]
            for name in ("hidden_states", "attentions")
            if f"output_{name}" in self.outputs
        }
        return {name: tuple(torch.cat(states, -2) for states in zip(*of, strict=True)) for name, of in calls.items()}

    def catch_up(self, cache: SequenceCache, ids_BS: torch.LongTensor) -> None:
        """Reads the kept tokens that are missing in the model's own cache."""
        if cache.unread_BU is not None and cache.unread_BU.shape[1]:
            outputs, _ = self._read(cache.unread_BU, cache.read, cache.held, cache.rows, logits_to_keep=1)
            cache.held, cache.unread_BU = outputs[cache_name(outputs)], None

    def _read(
        self, sequence_BN: torch.Tensor, start: int, held: Cache | None, rows: Rows, **options
    ) -> tuple[object, HiddenStateCapture]:
        """Calls the model on ids or embeddings that continue the `start` tokens in a cache."""
        columns = sequence_BN.shape[1]
        position_1N = torch.arange(start, start + columns, device=sequence_BN.device)[None]
        inputs = {
            "inputs_embeds" if sequence_BN.dim() == 3 else "input_ids": sequence_BN,
            "position_ids": rows.positions_of(position_1N),
            cache_name(self.known_arguments): held,
            "use_cache": True,
            **options,
        }
        with self.tuner.capture_hidden_states() as captured:
            return self.model(**accepted_inputs(inputs, self.known_arguments), **self.outputs), captured


class RecomputePass(RecurrentPass):
    """The forward pass of a model that cannot continue from a cache with several tokens."""

    def __call__(
        self, regular_BT: torch.LongTensor, layout: BlockLayout, cache: TextCache, logits_rows: int
    ) -> PassOutput:
        """Reads the text from its start. Arguments as in [`DecodingPass`]."""
        past = cache.rows.lengths
        confirmed, draft_BK = cache.split(regular_BT, logits_rows - 1)
        text = torch.cat([confirmed, draft_BK, layout.index_BM + self.tuner.vocab_size], dim=1)
        tokens = text.shape[1] - layout.masks
        with self.tuner.masks_in_columns(tokens, layout.index_BM, self.prepared_lora(text.device)):
            wanted = logits_rows + layout.masks
            outputs, captured = self._read(text, 0, None, cache.rows, use_cache=False, logits_to_keep=wanted)
        logits_BRV = outputs.logits[:, -wanted:][:, :logits_rows]
        regular = regular_BT.shape[1]
        states = self._states([(outputs, slice(tokens - regular, tokens), text.shape[1])])
        return PassOutput(logits_BRV, captured.states[:, tokens:], regular - logits_rows, past, **states)


def _over_text(state: torch.Tensor, last: int, end: int) -> torch.Tensor:
    """Pads attentions that end at column `last` to `(B, H, Q, end)`. Hidden states are unchanged."""
    return state if state.dim() == 3 else F.pad(state, (last - state.shape[-1], end - last))
