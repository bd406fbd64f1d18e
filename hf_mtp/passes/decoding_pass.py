"""The forward pass of decoding: computes logits of regular tokens and hidden states of masks.

Depends on the upgraded model and its cache, and not on strategies, verification or stopping.

Shapes: B batch, T regular columns, M masks, N = T + M, R positions with logits, D features, V vocabulary, H heads.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ..adapter.prepared import PreparedLora
from ..adapter.tuner import GatedLoraTuner
from ..base.caches import cache_name
from ..base.inspection import accepted_inputs, mask_form
from ..base.rope import rope_switches, scaled_columns
from ..cache.rollback import RollbackCache
from ..layout.attention import attention_kinds, attention_masks, padded_right
from ..layout.blocks import NO_DOCUMENT, BlockLayout, decoding_layout
from ..layout.mask_plan import no_masks
from .bitwise import bitwise_columns

CATCH_UP_COLUMNS = 4  # a storage of fixed size has room for this many after the longest row
FEW_MASKS = 16  # up to this many, their logits are computed with those of the regular tokens


@dataclass(frozen=True)
class PassOutput:
    """The results of a pass.

    Args:
        logits_BRV (`torch.Tensor` of shape `(B, R, V)`): Logits of the last R regular tokens.
        mask_BMD (`torch.Tensor` of shape `(B, M, D)`): Last hidden states of the masks.
        before (`int`): Number of regular columns before the first one with logits.
        past (`list[int]`): Number of columns that each row had in the cache.
        calls (`int`): Number of calls of the model.
        mask_logits_BMV (`torch.Tensor` of shape `(B, M, V)`, *optional*): The base's logits of the masks, if these are
            few: computing them later would read the unembedding's weights a second time.
        hidden_states (`tuple` of `(B, N, D)`, or `(A, B, N, D)` for models of A states per token), attentions
            (`tuple` of `(B, H, N, S)`): Per layer, if requested.
    """

    logits_BRV: torch.Tensor
    mask_BMD: torch.Tensor
    before: int
    past: list[int]
    calls: int = 1
    mask_logits_BMV: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

    @property
    def masks_are_finite(self) -> torch.Tensor:
        """A scalar: whether all states of masks are finite."""
        return torch.isfinite(self.mask_BMD).all()

    def block(self, column_BK: torch.LongTensor) -> torch.Tensor:
        """`(B, K, D)`: states of the masks in these columns; arbitrary where the column is -1."""
        if not self.mask_BMD.shape[1]:
            return self.mask_BMD.new_zeros(*column_BK.shape, self.mask_BMD.shape[2])
        return _in_columns(self.mask_BMD, column_BK)

    def block_logits(self, column_BK: torch.LongTensor) -> torch.Tensor | None:
        """`(B, K, V)`: logits of these masks, arbitrary where the column is -1; `None` if not computed."""
        return None if self.mask_logits_BMV is None else _in_columns(self.mask_logits_BMV, column_BK)

    def states_of_row(self, row: int, path: list[int] | None = None) -> list[dict]:
        """Hidden states and attentions from which each token was chosen, in order and in the shape of `generate`.

        Args:
            row (`int`): The row.
            path (`list[int]`, *optional*): In a tree of drafts, the columns whose logits chose the tokens.
        """
        if self.hidden_states is None and self.attentions is None:
            return []
        entries, before = [], self.past[row] + self.before
        path = range(self.logits_BRV.shape[1]) if path is None else path
        for position, column in enumerate(path):
            end = self.before + column + 1
            read = slice(0 if position == 0 else end - 1, end)  # the first token is chosen from the whole prompt
            entry = {}
            if self.hidden_states is not None:
                entry["hidden_states"] = tuple(states[..., row, read, :] for states in self.hidden_states)
            if self.attentions is not None:
                keys = [*range(before), *(before + seen for seen in path[: position + 1])]
                entry["attentions"] = tuple(
                    weights[row, read] if weights.dim() == 3 else weights[row, :, read][..., keys]
                    for weights in self.attentions
                )
            entries.append(entry)
        return entries


def _in_columns(value_BMx: torch.Tensor, column_BK: torch.LongTensor) -> torch.Tensor:
    """`(B, K, ...)`: the values in these columns."""
    return value_BMx.gather(1, column_BK.clamp(min=0)[:, :, None].expand(-1, -1, value_BMx.shape[2]))


class DecodingPass:
    """The forward pass of one upgraded model, as decoding needs it.

    Args:
        tuner ([`GatedLoraTuner`]): The upgraded model.
        output_hidden_states, output_attentions (`bool`): Whether to return them for all layers.
        compiled (`Callable`, *optional*): The model's compiled forward pass, used for all passes but the prompt's.
        bitwise (`bool`, *optional*, defaults to `False`): Whether regular columns are computed bit for bit as in
            plain decoding. The pass over the prompt then has no masks, so that it is that of plain decoding.
    """

    def __init__(
        self,
        tuner: GatedLoraTuner,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        compiled: Callable | None = None,
        bitwise: bool = False,
    ):
        self.compiled, self.bitwise = compiled, bitwise
        self.lora = None if compiled else PreparedLora()
        self.tuner, self.model = tuner, tuner.model
        config = self.model.config.get_text_config(decoder=True)
        self.kinds, self.form = attention_kinds(config), mask_form(self.model)
        wanted = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        self.outputs = {name: True for name, is_wanted in wanted.items() if is_wanted}
        self.known_arguments = inspect.signature(self.model.forward).parameters
        if "output_router_logits" in self.known_arguments:  # the router's loss accepts no 4-D mask
            self.outputs["output_router_logits"] = False
        self.shares_heads = compiled is None and self.model.config._attn_implementation == "sdpa"
        self.maximum = getattr(config, "max_position_embeddings", None) or 2**31
        self.is_rotary, self.switches = hasattr(config, "rope_parameters"), rope_switches(config)
        self.scaled_columns = scaled_columns(config)

    def __call__(
        self, regular_BT: torch.Tensor, layout: BlockLayout, cache: RollbackCache, logits_rows: int
    ) -> PassOutput:
        """Runs all columns and writes them after the tokens that the cache holds.

        Args:
            regular_BT (`torch.Tensor`): Token ids of shape `(B, T)`, or embeddings of shape `(B, T, D)`.
            layout ([`BlockLayout`]): Their positions, and the masks that follow them.
            cache ([`RollbackCache`]): All earlier tokens.
            logits_rows (`int`): R, the number of last regular tokens to return logits for.
        """
        regular, past = regular_BT.shape[1], cache.rows.lengths
        inputs = self._inputs(regular_BT, layout, cache, logits_rows)
        cache.rows.shares_heads = self.shares_heads and "attention_mask" in inputs
        forward = self.compiled if self.compiled is not None and cache.rows.longest else self.model
        lora = self.prepared_lora(regular_BT.device)
        with (
            self._bitwise_columns(cache, regular, layout.masks, logits_rows),
            self.tuner.masks_in_columns(regular, layout.index_BM, lora),
            self.tuner.capture_hidden_states() as captured,
        ):
            outputs = forward(**inputs, **self.outputs)
        logits = outputs.logits
        if "logits_to_keep" not in self.known_arguments:
            logits = logits[:, regular - logits_rows :]
        has_masks = logits.shape[1] > logits_rows
        return PassOutput(
            logits[:, :logits_rows],
            captured.states[:, regular:],
            regular - logits_rows,
            past,
            mask_logits_BMV=logits[:, logits_rows:] if has_masks else None,
            hidden_states=outputs.hidden_states if "output_hidden_states" in self.outputs else None,
            attentions=outputs.attentions if "output_attentions" in self.outputs else None,
        )

    def prepared_lora(self, device: torch.device) -> PreparedLora | None:
        """The LoRA weights that all passes use. Autocast and a compiled pass see to the weights themselves."""
        return None if torch.is_autocast_enabled(device.type) else self.lora

    def _bitwise_columns(
        self, cache: RollbackCache, regular: int, masks: int, logits_rows: int
    ) -> AbstractContextManager[None]:
        is_prompt, columns = regular > logits_rows, regular + masks
        if not self.bitwise or is_prompt or columns == 1:  # plain decoding's own pass
            return nullcontext()
        return bitwise_columns(self.model, cache.rows, len(cache.rows.lengths), regular, masks)

    def _inputs(
        self, regular_BT: torch.Tensor, layout: BlockLayout, cache: RollbackCache, logits_rows: int
    ) -> dict[str, object]:
        """The inputs of the model's forward pass. Arguments are those of `__call__`."""
        regular = regular_BT.shape[1]
        inputs = {
            "position_ids": self._positions(layout, cache, regular, drafts=logits_rows - 1),
            "logits_to_keep": self._logits_to_keep(regular, layout.masks, logits_rows, regular_BT.device),
            cache_name(self.known_arguments): cache,
            "use_cache": True,
        }
        if regular_BT.dim() == 3:
            masks_BMD = self.tuner.mask_embeddings(layout.index_BM).to(regular_BT.dtype)
            inputs["inputs_embeds"] = torch.cat([regular_BT, masks_BMD], dim=1)
        elif layout.masks:
            inputs["input_ids"] = torch.cat([regular_BT, layout.index_BM + self.tuner.vocab_size], dim=1)
        else:
            inputs["input_ids"] = regular_BT
        if not (cache.is_causal and layout.is_causal):  # else the model's own mask is right
            inputs["attention_mask"] = self._attention_mask(layout, cache, regular)
        for name, value_B1 in cache.extra_inputs.items():
            inputs[name] = value_B1.expand(-1, regular + layout.masks, *value_B1.shape[2:])
        return accepted_inputs(inputs, self.known_arguments)

    def _logits_to_keep(self, regular: int, masks: int, logits_rows: int, device: torch.device) -> int | torch.Tensor:
        """The columns to compute logits for: a number, which means the last ones, or their indices.

        The model cuts the last columns out of its states, and a slice of more columns is not contiguous. For such
        states, `F.linear` copies the unembedding's weights once per row (`expand`, then `bmm`), which can take longer
        than the rest of the pass. Indexing makes them contiguous.
        """
        few = masks if masks <= FEW_MASKS else 0
        wanted = logits_rows + few
        if few == masks and (wanted == regular + masks or self.bitwise):  # plain decoding takes a slice
            return wanted
        return torch.arange(regular - logits_rows, regular + few, device=device)

    def _attention_mask(self, layout: BlockLayout, cache: RollbackCache, regular: int):
        """The `attention_mask`. It is 2-D for padded prompts without masks, which takes less memory."""
        if not layout.masks and not cache.rows.longest and cache.rows.columns is None:
            seen_BT = layout.segment_BT > NO_DOCUMENT
            return (seen_BT & ~padded_right(cache.rows.hidden_BP, regular)).long()
        return attention_masks(layout, self.kinds, self.form, cache.seen_by(regular + layout.masks))

    def catch_up(self, cache: RollbackCache, ids_BS: torch.LongTensor) -> None:
        """Extends the cache of rows that ended before others by their last token and the padding after it.

        Args:
            cache ([`RollbackCache`]): The cache of rows that are all finished.
            ids_BS (`torch.LongTensor` of shape `(B, S)`): The padded texts. The cache needs all but the last column.
        """
        while not cache.rows.are_equal:
            missing = [cache.rows.longest - length for length in cache.rows.lengths]
            most = max(missing) if cache.rows.columns is None else min(max(missing), CATCH_UP_COLUMNS)
            rows = [ids[-1 - lacking :][:most] for ids, lacking in zip(ids_BS, missing, strict=True)]
            ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            layout = decoding_layout(cache.rows.next_places(ids_BT.shape[1]), no_masks(len(rows), 1, 1, ids_BT.device))
            self(ids_BT, layout, cache, logits_rows=1)
            cache.keep([min(most, lacking) for lacking in missing])

    def _positions(self, layout: BlockLayout, cache: RollbackCache, regular: int, drafts: int) -> torch.LongTensor:
        """`(B, N)`, or `(R, B, N)` for models with several position ids per token.

        Drafts and masks past the end of a table of positions cannot be accepted, so they get its last position. Rotary
        embeddings have no such end: drafts past `max_position_embeddings` may be accepted.
        """
        last = max(self.maximum, cache.rows.positions + regular - (0 if self.is_rotary else drafts)) - 1
        return cache.rows.positions_of(layout.position_BN).clamp(max=last)

    def positions_left(self, used: int) -> int:
        """How many positions are left for drafts and masks after the first `used`; very many if there is no limit."""
        ends = [self.maximum, *(end for end in self.switches if used <= end)]
        return min(ends) - used
