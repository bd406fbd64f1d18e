"""The forward passes of training: the regular tokens of a batch once, then chunks of its blocks of masks.

Regular tokens depend on frozen weights only. So they are processed first, without an autograd graph, and each chunk of
masks attends to their keys and values in one cache. The backward pass of a chunk can run before the next chunk is
processed, so memory does not grow with the number of blocks. This module depends on the speculation modes of models,
and not on losses.

Shapes: B batch, T regular tokens, M masks per row (of a chunk), N = T + M, Q query columns, D features.
"""

import inspect

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache
from transformers.utils import ModelOutput

from ..adapter.tuner import GatedLoraTuner
from ..base.autocast import concatenate
from ..base.caches import cache_name, copied
from ..base.distributed import is_sharded
from ..base.embedding import last_columns_embedded_as
from ..base.inspection import (
    decoder_of,
    evaluation_mode,
    has_dropout,
    input_device,
    is_checkpointing,
    is_media,
    mask_form,
    refuse_attention_without_masks,
    without_checkpointing,
)
from ..base.rope import rope_switches
from ..layout.attention import attention_kinds, attention_masks
from ..layout.blocks import NO_DOCUMENT, BlockLayout
from .speculation_mode import SpeculationMode, speculation_mode
from .training_checks import each_row_is_one_text, refuse_batches_of_sequences, refuse_multimodal


class TrainingPass:
    """The pass over a batch by a model that allows trees.

    Args:
        tuner ([`GatedLoraTuner`]): The upgraded model.
        input_ids_BT (`torch.LongTensor` of shape `(B, T)`): Regular tokens.
        layout ([`BlockLayout`]): Their positions, and their blocks of masks.
        all_layers (`bool`): Whether to return states of all layers.
        masks (`int`): Maximum number of mask tokens per chunk, summed over rows. A chunk has at least one block per
            row.
        base_inputs (`dict`): Further inputs of the base's forward pass, such as images.

    Attributes:
        regular (`list[torch.Tensor]` of shape `(B, T, D)`): States of the regular tokens, without gradient, in the
            order of the layers. The last is the input of the base's unembedding; without `all_layers`, it is the only
            one.
        chunks (`list[BlockLayout]`): The chunks of blocks to pass to [`TrainingPass.masks`], in order.
    """

    def __init__(
        self,
        tuner: GatedLoraTuner,
        input_ids_BT: torch.LongTensor,
        layout: BlockLayout,
        all_layers: bool,
        masks: int,
        base_inputs: dict,
    ):
        self.tuner, self.decoder, self.all_layers = tuner, decoder_of(tuner.model), all_layers
        self.base_inputs = base_inputs
        k = tuner.active_mtp_config.k
        self.chunks = layout.chunks(max(1, masks // (len(input_ids_BT) * k)) * k)
        self.read(input_ids_BT, layout)

    def read(self, input_ids_BT: torch.LongTensor, layout: BlockLayout) -> None:
        """Reads the regular tokens."""
        self.cache = DynamicCache()
        with torch.no_grad(), evaluation_mode(self.tuner.model):  # the base's dropout would change what masks learn
            regular = layout.without_masks()
            # Where each row is one text, no token attends to the padding after it.
            self.regular = self.states(input_ids_BT, regular, self.cache, is_causal=each_row_is_one_text(layout))

    def masks(self, chunk: BlockLayout) -> list[torch.Tensor]:
        """States of one chunk's masks, `(B, M, D)` each, for the same layers as `regular`."""
        with self.tuner.masks_in_columns(0, chunk.index_BM):
            return self.states(chunk.index_BM + self.tuner.vocab_size, chunk, copied(self.cache))

    def placeholders(
        self, chunk: BlockLayout, ids_BM: torch.LongTensor, embedding_E: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """The base's states `(B, M, D)` of each layer where it reads tokens in place of one chunk's masks.

        Args:
            chunk ([`BlockLayout`]): One of `chunks`.
            ids_BM (`torch.LongTensor` of shape `(B, M)`): The tokens.
            embedding_E (`torch.Tensor` of shape `(E,)`, *optional*): What to embed all of them as.
        """
        with last_columns_embedded_as(self.tuner.model, chunk.masks, embedding_E):
            return self.states(ids_BM, chunk, copied(self.cache))

    def states(
        self, input_ids_BQ: torch.LongTensor, layout: BlockLayout, cache: Cache | None, is_causal: bool = False
    ) -> list[torch.Tensor]:
        """States, `(B, Q, D)` each, of the last Q columns of a layout. The cache has the columns before these.

        With `is_causal` the model's own causal mask is used, since a mask of ours would be large for a long text.
        """
        queries, model = input_ids_BQ.shape[1], self.tuner.model
        form = mask_form(model, self.dtype)
        kinds = attention_kinds(model.config.get_text_config(decoder=True))
        return self.call(
            input_ids_BQ,
            attention_mask=None if is_causal else attention_masks(layout, kinds, form, queries=queries),
            position_ids=self.position_ids(layout, queries),
            use_cache=cache is not None,
            **{cache_name(inspect.signature(self.decoder.forward).parameters): cache},
        )

    def position_ids(self, layout: BlockLayout, queries: int) -> torch.LongTensor:
        """Position ids of the last columns. Past the end, where masks have no target, there may be no positions."""
        return layout.position_BN[:, -queries:].clamp(max=layout.position_BT.max())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which attention computes."""
        model = self.tuner.model
        device = input_device(model).type  # `model.device` is "meta" while weights are offloaded
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype

    def call(self, input_ids: torch.LongTensor, **inputs) -> list[torch.Tensor]:
        """Runs the decoder and returns its states."""
        return self.states_of(self.decoder(input_ids=input_ids, output_hidden_states=self.all_layers, **inputs))

    def states_of(self, outputs: ModelOutput) -> list[torch.Tensor]:
        """The states in the decoder's outputs, first layer to last, moved to the device of the token ids."""
        states = [*(outputs.hidden_states[:-1] if self.all_layers else ()), outputs.last_hidden_state]
        return [state.to(input_device(self.tuner.model)) for state in states]


class SinglePass(TrainingPass):
    """The pass without a cache: everything at once.

    For gradient checkpointing, whose layers run again and use no cache; and for rotary embeddings that change within
    the text, by the last position of a pass.
    """

    def read(self, input_ids_BT: torch.LongTensor, layout: BlockLayout) -> None:
        self.chunks, self.input_ids_BT, length = [layout], input_ids_BT, input_ids_BT.shape[1]
        columns = torch.cat([input_ids_BT, layout.index_BM + self.tuner.vocab_size], dim=1)
        with self.tuner.masks_in_columns(length, layout.index_BM):
            states = self.states(columns, layout, None)
        self.regular = [state[:, :length].detach() for state in states]
        if has_dropout(self.tuner.model):  # which must not change what masks learn
            with torch.no_grad(), evaluation_mode(self.tuner.model):
                self.regular = self.states(input_ids_BT, layout.without_masks(), None)
        self._masks = [state[:, length:] for state in states]

    def masks(self, chunk: BlockLayout) -> list[torch.Tensor]:
        return self._masks

    def placeholders(
        self, chunk: BlockLayout, ids_BM: torch.LongTensor, embedding_E: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        with last_columns_embedded_as(self.tuner.model, chunk.masks, embedding_E):
            states = self.states(torch.cat([self.input_ids_BT, ids_BM], dim=1), chunk, None)
        return [state[:, -chunk.masks :] for state in states]


class MultimodalPass(TrainingPass):
    """The pass over batches with more than text: the base itself reads the regular tokens and images.

    Masks follow text. They attend to the base's cache, at the positions that the base gave to its decoder.

    Raises:
        NotImplementedError: The base's decoder needs more than its cache and positions to continue a text.
    """

    def read(self, input_ids_BT: torch.LongTensor, layout: BlockLayout) -> None:
        self.cache, calls = DynamicCache(), []
        names = inspect.signature(self.tuner.model.forward).parameters
        inputs = {cache_name(names): self.cache, "use_cache": True, "output_hidden_states": self.all_layers}
        if "logits_to_keep" in names:
            inputs["logits_to_keep"] = 1
        hook = self.decoder.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
        try:
            with torch.no_grad(), evaluation_mode(self.tuner.model):
                self.tuner.model(input_ids=input_ids_BT, **self.base_inputs, **inputs)
                *_, given, outputs = calls[-1]
                positions = given.get("position_ids")
                self.positions = layout.position_BT if positions is None else positions
                self.regular = self.states_of(outputs)
                self._refuse_other_states(input_ids_BT, layout)
        finally:
            hook.remove()

    def position_ids(self, layout: BlockLayout, queries: int) -> torch.LongTensor:
        """Positions that continue from the token after the anchor. Images use several positions."""
        first = (layout.anchor_BM[:, -queries:] + 1).clamp(max=self.positions.shape[-1] - 1)
        first = first.expand(*self.positions.shape[:-2], -1, -1)
        positions = self.positions.expand(*first.shape[:-1], -1).gather(-1, first) + layout.index_BM[:, -queries:]
        return positions.clamp(max=self.positions.max())

    def masks(self, chunk: BlockLayout) -> list[torch.Tensor]:
        with without_checkpointing(self.tuner.model):  # its layers use no cache; chunks bound memory, too
            return super().masks(chunk)

    def _refuse_other_states(self, input_ids_BT: torch.LongTensor, layout: BlockLayout) -> None:
        """Reads one regular token per row in the way of masks, and compares its state with the base's own."""
        anchor_B1 = layout.anchor_BM[:, -1:].clamp(max=input_ids_BT.shape[1] - 2)
        probe = BlockLayout.of_blocks(anchor_B1, layout.position_BT, layout.segment_BT, k=1)
        found_BD = self.states(input_ids_BT.gather(1, anchor_B1 + 1), probe, copied(self.cache))[-1][:, 0]
        rows = torch.arange(len(input_ids_BT), device=input_ids_BT.device)
        true_BD = self.regular[-1][rows, anchor_B1[:, 0] + 1]
        is_text_BT = (layout.segment_BT > NO_DOCUMENT) & ~is_media(self.tuner.model.config, input_ids_BT)
        is_text_B = is_text_BT.gather(1, anchor_B1 + 1)[:, 0]  # blocks that only fill up a row may hang anywhere
        error_B = (found_BD - true_BD).float().norm(dim=1) / true_BD.float().norm(dim=1)
        if (error_B[is_text_B] > max(16 * torch.finfo(self.dtype).eps, 1e-3)).any():
            raise NotImplementedError(
                f"{type(self.tuner.model).__name__} computes different hidden states for text when it also gets "
                f"{', '.join(sorted(self.base_inputs))}, so masks would learn from states that decoding does not "
                "have. Remove these inputs from the batches, or train on text only."
            )


class SequencePass(TrainingPass):
    """The pass of a model that allows no tree: each block is read as a sequence, after the text up to its anchor.

    Blocks hang on the same columns in all rows.

    Raises:
        ValueError: A row holds several texts, or is padded at its start.
        NotImplementedError: The weights are sharded over processes.
    """

    def read(self, input_ids_BT: torch.LongTensor, layout: BlockLayout) -> None:
        refuse_batches_of_sequences(self.tuner, layout)
        self.input_ids_BT = input_ids_BT
        with torch.no_grad(), evaluation_mode(self.tuner.model):
            self.regular = self.call(input_ids_BT, use_cache=False)

    def masks(self, chunk: BlockLayout) -> list[torch.Tensor]:
        return self._blocks(chunk, chunk.index_BM + self.tuner.vocab_size, masks=self.tuner.active_mtp_config.k)

    def placeholders(
        self, chunk: BlockLayout, ids_BM: torch.LongTensor, embedding_E: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        with last_columns_embedded_as(self.tuner.model, self.tuner.active_mtp_config.k, embedding_E):
            return self._blocks(chunk, ids_BM, masks=0)

    def _blocks(self, chunk: BlockLayout, ids_BM: torch.LongTensor, masks: int) -> list[torch.Tensor]:
        """Reads each block of k columns after the text up to its anchor. The first `masks` of them are masks."""
        k, blocks, length = self.tuner.active_mtp_config.k, [], self.input_ids_BT.shape[1]
        for anchor, ids_Bk in zip(chunk.anchor_BM[0, ::k].tolist(), ids_BM.split(k, dim=1), strict=True):
            past = max(0, anchor + 1 + k - length) if masks else 0  # masks past the end, which have no target
            sequence = torch.cat([self.input_ids_BT[:, : anchor + 1], ids_Bk[:, : k - past]], dim=1)
            with self.tuner.masks_in_columns(anchor + 1, chunk.index_BM[:, : masks and k - past]):
                states = self.call(sequence, use_cache=False)
            blocks.append([F.pad(layer[:, anchor + 1 :], (0, 0, 0, past)) for layer in states])
        return [concatenate(layer, dim=1) for layer in zip(*blocks, strict=True)]


def training_pass(
    tuner: GatedLoraTuner,
    input_ids_BT: torch.LongTensor,
    layout: BlockLayout,
    all_layers: bool,
    masks: int,
    base_inputs: dict | None = None,
) -> TrainingPass:
    """Reads a batch with the pass that suits the model. Arguments are those of [`TrainingPass`].

    Raises:
        ValueError: The base's attention implementation accepts no 4-D mask.
        NotImplementedError: The batch has more than text, which this model or its sharding does not allow.
    """
    refuse_attention_without_masks(tuner.model)
    if is_sharded(tuner):  # all processes must run the same number of passes
        masks = layout.anchor_BM.numel()
    allows_tree = speculation_mode(tuner.model) is SpeculationMode.TREE
    # Chunks of masks would have other rotary embeddings than the text, if these changed within it.
    at_once = tuner.model.training and is_checkpointing(tuner.model)
    at_once |= any(length <= layout.position_BT.max() for length in rope_switches(tuner.model.config))
    if base_inputs:
        refuse_multimodal(tuner, base_inputs, allows_tree)
        kind = MultimodalPass
    elif not allows_tree:
        kind = SequencePass
    else:
        kind = SinglePass if at_once else TrainingPass
    return kind(tuner, input_ids_BT, layout, all_layers, masks, base_inputs or {})
