"""What training reads: a batch's regular tokens once, and blocks of masks behind them, some at a time.

Regular tokens depend on frozen weights only. They are read first, without a graph, and every part of the masks then
reads their keys and values from one cache: a part can go backward before the next one is read, so that memory does not
grow with the number of blocks. How a model reads decides how that is done.

Shapes: B batch, T regular tokens, M masks per row (of a part), N = T + M, Q query columns, D features.
"""

import inspect

import torch
from transformers import Cache, DynamicCache

from ..adapter.tuner import GatedLoraTuner
from ..base.caches import cache_name, copied
from ..base.distributed import is_sharded
from ..base.inspection import decoder_of, is_checkpointing, mask_form, refuse_attention_without_masks
from ..layout.attention import attention_kinds, attention_masks
from ..layout.blocks import BlockLayout
from .speculation_mode import SpeculationMode, speculation_mode


class TrainingPass:
    """A batch, read by a model that takes branches.

    Args:
        tuner ([`GatedLoraTuner`]): The upgraded model.
        input_ids_BT (`torch.LongTensor` of shape `(B, T)`): Regular tokens.
        layout ([`BlockLayout`]): Their positions, and the blocks that hang on them.
        all_layers (`bool`): Whether states between layers are wanted too.
        masks (`int`): Mask tokens per part at most, all rows together; a part has one block per row at least.

    Attributes:
        regular (`list[torch.Tensor]` of shape `(B, T, D)`): States of the regular tokens, without gradient, in the
            order of the layers; the last is what the base's unembedding reads. Without `all_layers` it is the only
            one.
        parts (`list[BlockLayout]`): The blocks that [`TrainingPass.masks`] takes, one after the other.
    """

    def __init__(
        self,
        tuner: GatedLoraTuner,
        input_ids_BT: torch.LongTensor,
        layout: BlockLayout,
        all_layers: bool,
        masks: int,
    ):
        self.tuner, self.decoder, self.all_layers = tuner, decoder_of(tuner.model), all_layers
        k = tuner.active_mtp_config.k
        self.parts = layout.parts(max(1, masks // (len(input_ids_BT) * k)) * k)
        self.read(input_ids_BT, layout)

    def read(self, input_ids_BT: torch.LongTensor, layout: BlockLayout) -> None:
        """Reads the regular tokens. Of rows that hold one text each, none sees the padding behind it."""
        self.cache = DynamicCache()
        with torch.no_grad():
            regular = layout.without_masks()
            self.regular = self.states(input_ids_BT, regular, self.cache, is_causal=each_row_is_one_text(layout))

    def masks(self, part: BlockLayout) -> list[torch.Tensor]:
        """`(B, M, D)`, as many as `regular` has: states of one part's masks."""
        with self.tuner.masks_in_columns(0, part.index_BM):
            return self.states(part.index_BM + self.tuner.vocab_size, part, copied(self.cache))

    def states(
        self, input_ids_BQ: torch.LongTensor, layout: BlockLayout, cache: Cache | None, is_causal: bool = False
    ) -> list[torch.Tensor]:
        """States, `(B, Q, D)` each, of the last Q columns of a layout; the cache has the columns before.

        Where the model's own causal mask is right, `is_causal`, none is made: that of a long text is large.
        """
        queries, device_type, model = input_ids_BQ.shape[1], input_ids_BQ.device.type, self.tuner.model
        autocast = torch.is_autocast_enabled(device_type)
        form = mask_form(model, torch.get_autocast_dtype(device_type) if autocast else model.dtype)
        kinds = attention_kinds(model.config.get_text_config(decoder=True))
        return self.call(
            input_ids_BQ,
            attention_mask=None if is_causal else attention_masks(layout, kinds, form, queries=queries),
            position_ids=layout.position_BN[:, -queries:],
            use_cache=cache is not None,
            **{cache_name(inspect.signature(self.decoder.forward).parameters): cache},
        )

    def call(self, input_ids: torch.LongTensor, **inputs) -> list[torch.Tensor]:
        """The decoder's states."""
        outputs = self.decoder(input_ids=input_ids, output_hidden_states=self.all_layers, **inputs)
        states = [*(outputs.hidden_states[:-1] if self.all_layers else ()), outputs.last_hidden_state]
        return [state.to(input_ids.device) for state in states]


class CheckpointedPass(TrainingPass):
    """The same where layers run again in the backward pass: these take no cache, so that all is one pass."""

    def read(self, input_ids_BT: torch.LongTensor, layout: BlockLayout) -> None:
        self.parts, length = [layout], input_ids_BT.shape[1]
        columns = torch.cat([input_ids_BT, layout.index_BM + self.tuner.vocab_size], dim=1)
        with self.tuner.masks_in_columns(length, layout.index_BM):
            states = self.states(columns, layout, None)
        self.regular = [state[:, :length].detach() for state in states]
        self._masks = [state[:, length:] for state in states]

    def masks(self, part: BlockLayout) -> list[torch.Tensor]:
        return self._masks


class SequencePass(TrainingPass):
    """The same for a model that takes no branches: each block is read as a sequence, behind the text to its anchor.

    Blocks hang on the same columns in all rows.

    Raises:
        ValueError: A row holds several texts.
        NotImplementedError: Each process has a part of the weights.
    """

    def read(self, input_ids_BT: torch.LongTensor, layout: BlockLayout) -> None:
        if not each_row_is_one_text(layout):
            raise ValueError(
                f"{type(self.tuner.model).__name__} reads one sequence per row, but the batch is packed: rows hold "
                "several texts. Set packing=False."
            )
        if is_sharded(self.tuner):
            raise NotImplementedError(
                f"{type(self.tuner.model).__name__} reads each block of masks in a pass of its own. Processes "
                "that hold parts of its weights would wait for each other for ever, differing in how many blocks they "
                "have. Train with whole weights in every process: DDP or DeepSpeed ZeRO-2."
            )
        self.input_ids_BT = input_ids_BT
        with torch.no_grad():
            self.regular = self.call(input_ids_BT, use_cache=False)

    def masks(self, part: BlockLayout) -> list[torch.Tensor]:
        k, blocks = self.tuner.active_mtp_config.k, []
        for anchor in part.anchor_BM[0, ::k].tolist():
            index_Bk = part.index_BM[:, :k]
            sequence = torch.cat([self.input_ids_BT[:, : anchor + 1], index_Bk + self.tuner.vocab_size], dim=1)
            with self.tuner.masks_in_columns(anchor + 1, index_Bk):
                blocks.append([layer[:, anchor + 1 :] for layer in self.call(sequence, use_cache=False)])
        return [torch.cat(layer, dim=1) for layer in zip(*blocks, strict=True)]


def training_pass(
    tuner: GatedLoraTuner, input_ids_BT: torch.LongTensor, layout: BlockLayout, all_layers: bool, masks: int
) -> TrainingPass:
    """Reads a batch as the model can. Arguments are those of [`TrainingPass`].

    Raises:
        ValueError: The base's attention implementation takes no 4-D mask.
    """
    refuse_attention_without_masks(tuner.model)
    if is_sharded(tuner):  # all processes must run the same number of passes
        masks = layout.anchor_BM.numel()
    if speculation_mode(tuner.model) is not SpeculationMode.TREE:
        kind = SequencePass
    elif tuner.model.training and is_checkpointing(tuner.model):
        kind = CheckpointedPass
    else:
        kind = TrainingPass
    return kind(tuner, input_ids_BT, layout, all_layers, masks)


def each_row_is_one_text(layout: BlockLayout) -> bool:
    """Whether no row is packed, or padded at its start."""
    return not bool((layout.segment_BT > 0).any() or (layout.segment_BT[:, 0] < 0).any())
