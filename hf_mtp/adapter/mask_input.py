"""Masks in the input of a base model: their ids, their embeddings, and the states that come of them.

Knows the base's embeddings and decoder, through hooks on these, and the gate. Knows nothing of PEFT's lifecycle.

Shapes: B batch, N columns (regular tokens, then M masks), D hidden size, E size of an embedding, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..base.distributed import hold_in_forward, past_sharding
from ..base.inspection import decoder_of, device_of, input_device, weight_shape
from .config import GatedLoraConfig
from .gate import Gate, HiddenStateCapture, MaskColumns
from .sampler import SamplerHead


class MaskInput:
    """What a tuner of a base model has to do with masks in the base's input.

    Attributes:
        vocab_size (`int`): V, ids of the base's vocabulary.
        active_mtp_config ([`GatedLoraConfig`]): Configuration of the active adapter.
    """

    gate: Gate
    lora_mask_embeddings: nn.ModuleDict
    lora_sampler_heads: nn.ModuleDict

    @property
    def vocab_size(self) -> int:
        return weight_shape(self.model.get_input_embeddings())[0]

    @property
    def active_mtp_config(self) -> GatedLoraConfig:
        if len(self.active_adapters) != 1:
            raise ValueError(
                f"Masks belong to one adapter, but {len(self.active_adapters)} are active: {self.active_adapters}. "
                "Choose one with `set_adapter`."
            )
        return self.peft_config[self.active_adapters[0]]

    def sampler_head(self) -> SamplerHead | None:
        """The sampler head of the active adapter, if it has one."""
        name = self.active_adapters[0]
        return self.lora_sampler_heads[name] if name in self.lora_sampler_heads else None

    def mask_embeddings(self, index_BM: torch.LongTensor) -> torch.Tensor:
        """`(B, M, E)`: what the active adapter embeds masks `index_BM` as."""
        return self.lora_mask_embeddings[self.active_adapters[0]](index_BM)

    def unembedding(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The base's output layer, `(..., D)` to `(..., V)`; its result is where the rest of ours computes."""
        layer = self.model.get_output_embeddings()
        if device_of(layer) == input_device(self.model):
            return past_sharding(layer)
        return lambda hidden: layer(hidden).to(hidden.device)

    @contextmanager
    def masks_in_columns(self, first: int, index_BM: torch.LongTensor) -> Iterator[None]:
        """Within, inputs hold mask tokens `index_BM` in the columns from `first` on, and LoRA acts there."""
        with self.gate.open(MaskColumns(first, index_BM, self.active_adapters[0]) if index_BM.shape[1] else None):
            yield

    def capture_hidden_states(self) -> AbstractContextManager[HiddenStateCapture]:
        """Within, a forward pass leaves the last hidden states of all its columns in what is yielded."""
        return self.gate.capture_hidden_states()

    def forward(self, input_ids: torch.LongTensor | None = None, *args, **kwargs):
        """The base's forward pass, in which the ids V..V+k-1 are mask tokens.

        Masks stand after all regular tokens, in the same columns of every row. The caller passes the attention mask
        and the position ids that a layout needs. Without these the input is a plain causal sequence.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, N)`): Token ids.
            args, kwargs: What the base's `forward` takes.

        Raises:
            ValueError: Ids above V+k-1, a regular token after a mask, or a column with masks in some rows only.
        """
        if input_ids is None or not (is_mask_BN := input_ids >= self.vocab_size).any():
            return self.model(input_ids, *args, **kwargs)
        index_BN = input_ids - self.vocab_size
        first = int((~is_mask_BN).sum(dim=1).max())
        if (
            index_BN.max() >= self.active_mtp_config.k
            or is_mask_BN[:, :first].any()
            or not is_mask_BN[:, first:].all()
        ):
            raise ValueError(
                f"Got token ids up to {input_ids.max().item()}. Ids {self.vocab_size} to "
                f"{self.vocab_size + self.active_mtp_config.k - 1} are mask tokens and must stand after all regular "
                "tokens, in the same columns of every row; there are none above."
            )
        with self.masks_in_columns(first, index_BN[:, first:]):
            return self.model(input_ids, *args, **kwargs)

    # ---------------------------------------------------------------- hooks on the base

    def _hook_base(self, model: nn.Module) -> list[RemovableHandle]:
        """Makes the base take masks."""
        embedding = model.get_input_embeddings()
        others = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not embedding]
        return [
            embedding.register_forward_pre_hook(self._embed_regular_ids),
            embedding.register_forward_hook(self._append_mask_embeddings),
            *(other.register_forward_pre_hook(self._drop_mask_ids) for other in others),
            decoder_of(model).register_forward_hook(self._keep_last_states),
            self.register_forward_pre_hook(self._hold_unembedding),
        ]

    def _embed_regular_ids(self, embedding: nn.Module, args: tuple) -> tuple | None:
        """Forward pre-hook: the base embeds regular ids only; it has no row for a mask."""
        columns = self.gate.columns
        return None if columns is None else (args[0][:, : columns.first], *args[1:])

    def _drop_mask_ids(self, table: nn.Embedding, args: tuple) -> tuple | None:
        """Forward pre-hook of other tables that a model may have for the same ids: masks are read as id 0 there."""
        if self.gate.columns is None or not isinstance(args[0], torch.Tensor):
            return None
        return (args[0].where(args[0] < table.num_embeddings, 0), *args[1:])

    def _append_mask_embeddings(self, embedding: nn.Module, args: tuple, regular: torch.Tensor) -> torch.Tensor | None:
        """Forward hook: the masks' own embeddings follow."""
        columns = self.gate.columns
        if columns is None:
            return None
        masks = self.lora_mask_embeddings[columns.adapter](columns.index)
        return torch.cat([regular, masks.to(regular.dtype)], dim=1)

    def _keep_last_states(self, decoder: nn.Module, args: tuple, outputs) -> None:
        """Forward hook: decoding needs the last hidden states of all columns, which logits alone do not give."""
        capture = self.gate.capture
        if capture is not None:
            capture.states = outputs.last_hidden_state.to(input_device(self.model))

    def _hold_unembedding(self, *_) -> None:
        """Forward pre-hook: training unembeds more often than the base does."""
        hold_in_forward(self, self.model.get_output_embeddings())
