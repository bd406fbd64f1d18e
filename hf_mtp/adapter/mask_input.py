"""Masks in the input of a base model: their ids, their embeddings and their hidden states.

Knows the base's embeddings and decoder, through hooks on these, and the gate. Knows nothing of PEFT's lifecycle.

Shapes: B batch, N columns (regular tokens, then M masks), D hidden size, E size of an embedding, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import reduce

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..base.autocast import concatenate
from ..base.distributed import hold_in_forward, past_sharding
from ..base.head import PredictionHead
from ..base.inspection import decoder_of, device_of, input_device, weight_shape
from .config import GatedLoraConfig
from .gate import Gate, HiddenStateCapture, MaskColumns
from .prepared import PreparedLora
from .sampler import SamplerHead


class MaskInput:
    """What a tuner of a base model has to do with masks in the base's input.

    Attributes:
        vocab_size (`int`): V, ids of the base's vocabulary.
        active_mtp_config ([`GatedLoraConfig`]): Configuration of the active adapter.
    """

    gate: Gate
    head: PredictionHead
    lora_mask_embeddings: nn.ModuleDict
    lora_sampler_heads: nn.ModuleDict
    noise_tokens: nn.ModuleDict

    @property
    def vocab_size(self) -> int:
        return weight_shape(self.model.get_input_embeddings())[0]

    @property
    def active_mtp_config(self) -> GatedLoraConfig:
        if len(self.active_adapters) != 1:
            raise ValueError(
                f"Mask tokens belong to one adapter, but {len(self.active_adapters)} adapters are active: "
                f"{self.active_adapters}. Choose one with `set_adapter`."
            )
        return self.peft_config[self.active_adapters[0]]

    def sampler_head(self) -> SamplerHead | None:
        """The sampler head of the active adapter, if it has one."""
        name = self.active_adapters[0]
        return self.lora_sampler_heads[name] if name in self.lora_sampler_heads else None

    def mask_embeddings(self, index_BM: torch.LongTensor) -> torch.Tensor:
        """`(B, M, E)`: what the active adapter embeds masks `index_BM` as."""
        name = self.active_adapters[0]
        if name in self.noise_tokens:
            return self.model.get_input_embeddings()(self.noise_tokens[name](index_BM))
        return self.lora_mask_embeddings[name](index_BM)

    @property
    def masks_device(self) -> torch.device:
        """Where the active adapter keeps its mask embeddings or noise tokens."""
        name = self.active_adapters[0]
        if name in self.noise_tokens:
            return self.noise_tokens[name].ids.device
        return device_of(self.lora_mask_embeddings[name])

    def unembedding(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The base's prediction head, `(..., D)` to `(..., V)`. Its result is where the rest of ours computes."""
        layers, dtype = self.head.layers(self.model), None
        if not self.head.names:
            weight = layers[0].weight
            if weight.is_floating_point() and weight.dtype.itemsize > self.model.dtype.itemsize:
                dtype = weight.dtype  # some models keep their unembedding in float32
            elif device_of(layers[0]) == input_device(self.model):
                return past_sharding(layers[0])
        return lambda hidden: reduce(lambda states, layer: layer(states), layers, hidden.to(dtype)).to(hidden.device)

    @contextmanager
    def masks_in_columns(
        self, first: int, index_BM: torch.LongTensor, lora: PreparedLora | None = None
    ) -> Iterator[None]:
        """Within, inputs hold mask tokens `index_BM` in the columns from `first` on, and LoRA acts there.

        It is computed with the weights in `lora` where it can be.
        """
        columns = MaskColumns(first, index_BM, self.active_adapters[0], lora) if index_BM.shape[1] else None
        with self.gate.open(columns):
            yield

    def capture_hidden_states(self) -> AbstractContextManager[HiddenStateCapture]:
        """Within, a forward pass leaves the last hidden states of all its columns in what is yielded."""
        return self.gate.capture_hidden_states()

    def forward(self, input_ids: torch.LongTensor | None = None, *args, **kwargs):
        """The base's forward pass, in which the ids V..V+k-1 are mask tokens.

        Masks must follow all regular tokens, in the same columns of every row. The caller passes the attention mask
        and position ids of the layout. Without these the input is a plain causal sequence.

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
                f"{self.vocab_size + self.active_mtp_config.k - 1} are mask tokens, which must follow all regular "
                "tokens, in the same columns of every row. Larger ids do not exist."
            )
        with self.masks_in_columns(first, index_BN[:, first:]):
            return self.model(input_ids, *args, **kwargs)

    # ---------------------------------------------------------------- hooks on the base

    def _hook_base(self, model: nn.Module) -> list[RemovableHandle]:
        """Makes the base take masks."""
        embedding, decoder = model.get_input_embeddings(), decoder_of(model)
        around = [part for part in model.modules() if part is not model and decoder in part.modules()]
        return [
            embedding.register_forward_pre_hook(self._embed_own_ids),
            embedding.register_forward_hook(self._append_mask_embeddings),
            *(part.register_forward_pre_hook(self._hide_mask_ids, with_kwargs=True) for part in around),
            decoder.register_forward_hook(self._keep_last_states),
            self.register_forward_pre_hook(self._hold_unembedding),
        ]

    def _embed_own_ids(self, embedding: nn.Module, args: tuple) -> tuple | None:
        """Forward pre-hook: the base embeds regular ids, and noise tokens. It has no row for other masks."""
        columns = self.gate.columns
        if columns is None:
            return None
        ids = args[0][:, : columns.first]
        if columns.adapter in self.noise_tokens:
            ids = torch.cat([ids, self.noise_tokens[columns.adapter](columns.index)], dim=1)
        return ids, *args[1:]

    def _hide_mask_ids(self, part: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Forward pre-hook: the base's code, which may have other tables of ids, gets an ordinary id for each mask."""
        if self.gate.columns is None:
            return None
        is_padding = getattr(self.model.config.get_text_config(decoder=True), "pad_token_id", None) == 0
        ids_BN = args[0] if args else kwargs.get("input_ids")
        if ids_BN is None:
            return None
        ids_BN = ids_BN.where(ids_BN < self.vocab_size, int(is_padding))
        return ((ids_BN, *args[1:]), kwargs) if args else ((), {**kwargs, "input_ids": ids_BN})

    def _append_mask_embeddings(self, embedding: nn.Module, args: tuple, regular: torch.Tensor) -> torch.Tensor | None:
        """Forward hook: the masks' own embeddings follow."""
        columns = self.gate.columns
        if columns is None or columns.adapter in self.noise_tokens:
            return None
        masks = self.lora_mask_embeddings[columns.adapter](columns.index).to(regular.dtype)
        return concatenate([regular, masks], dim=1)

    def _keep_last_states(self, decoder: nn.Module, args: tuple, outputs) -> None:
        """Forward hook: decoding needs the last hidden states of all columns, which logits alone do not give."""
        capture = self.gate.capture
        if capture is not None:
            capture.states = outputs.last_hidden_state.to(input_device(self.model))

    def _hold_unembedding(self, *_) -> None:
        """Forward pre-hook: training unembeds more often than the base does."""
        for layer in self.head.layers(self.model):
            hold_in_forward(self, layer)
