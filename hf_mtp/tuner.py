"""The upgraded model: a frozen base, gated LoRA on its linear layers, mask embeddings and a sampler head.

Extends PEFT's LoRA tuner through its public seams: LoRA variants for the gate, tuner-level modules for the two heads.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Cache, DynamicCache

from .cache import cache_name
from .config import GatedLoraConfig
from .drafting import Drafts, Draw, draft
from .fingerprint import refuse_other_base
from .gate import Gate, MaskColumns, gate_lora_layer
from .generation import MTPGenerationMixin
from .layout import IGNORE, BlockLayout, segments, training_layout
from .masks import attention_kinds, attention_masks
from .objective import Objective, multi_token_objective
from .peers import hold_in_forward, is_sharded, past_sharding, whole_weight
from .reading import Reading, reading_of
from .recipe import Recipe
from .sampler import SamplerHead
from .stacked import UsersLayer, is_gated, refuse_name, restore, untouched, users_layers
from .support import (
    decoder_of,
    device_of,
    input_device,
    refuse_attention_without_masks,
    refuse_unsupported,
    weight_shape,
)
from .targets import exclude_layers_out_of_reach, linear_layers, shortened

# Training attends from this many blocks at a time to the tokens before them and to each other: more blocks mean more
# attention from block to block, all of it masked out; fewer mean more copies of the keys and values before them.
BLOCKS_PER_ROW = 16


class GatedLoraModel(MTPGenerationMixin, LoraModel):
    """A causal language model that predicts several tokens at mask positions.

    Made by [`~peft.get_peft_model`] from a [`GatedLoraConfig`], or by [`~peft.PeftModel.from_pretrained`]; not meant
    to be made by hand. Regular tokens are computed by the base alone. Mask tokens have ids V..V+k-1, above the base's
    V ids, and stand after all regular tokens of an input.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base, frozen.
        peft_config ([`GatedLoraConfig`]): The adapter.
        adapter_name (`str`): Its name.

    Attributes:
        vocab_size (`int`): V, ids of the base's vocabulary.
        active_mtp_config ([`GatedLoraConfig`]): Configuration of the active adapter.
        mtp_statistics ([`MTPStatistics`]): Counts of the latest `generate(mtp=True)`.
    """

    # ---------------------------------------------------------------- building

    def __init__(self, model: nn.Module, peft_config, adapter_name: str, **kwargs):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        # PEFT keeps the configs of the user's own adapters here, and would add ours to them.
        configs = base.__dict__.pop("peft_config", None) if users_layers(base) else None
        try:
            super().__init__(base, peft_config, adapter_name, **kwargs)
        except Exception:
            if configs is not None:
                base.peft_config = configs
            raise
        self._users_configs = configs

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, low_cpu_mem_usage: bool = False, **kwargs):
        config: GatedLoraConfig = self.peft_config[adapter_name]
        refuse_unsupported(model)
        refuse_other_base(config, model)
        if "gate" not in self.__dict__:
            self.gate = Gate()
            self.lora_mask_embeddings, self.lora_sampler_heads = nn.ModuleDict(), nn.ModuleDict()
            embedding = model.get_input_embeddings()
            self._hooks = (
                embedding.register_forward_pre_hook(self._embed_regular_ids),
                embedding.register_forward_hook(self._append_mask_embeddings),
                *(
                    other.register_forward_pre_hook(self._drop_mask_ids)
                    for other in model.modules()
                    if isinstance(other, nn.Embedding) and other is not embedding
                ),
                decoder_of(model).register_forward_hook(self._keep_last_states),
                self.register_forward_pre_hook(self._hold_unembedding),
            )
        theirs = users_layers(model)
        refuse_name(adapter_name, theirs)
        if config.target_modules == "all-linear":  # a saved adapter names its layers
            config.exclude_modules = exclude_layers_out_of_reach(config.exclude_modules, model)
            if theirs:  # whose own weights are linear layers, too
                config.target_modules = set(shortened(set(linear_layers(model)), model))
        with untouched(model):
            super().inject_adapter(model, adapter_name, *args, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
        for layer in theirs.values():
            layer.requires_grad_(False)
        with torch.device("meta") if low_cpu_mem_usage else torch.device("cpu"):
            self._add_heads(adapter_name, config)
        self._sync_heads()
        if _is_checkpointing(model):  # switched on before the upgrade: once more, with the gate
            self.activation_checkpointing_enable()

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if isinstance(target, BaseTunerLayer) and not is_gated(target):
            target = UsersLayer(target)
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )
        gate_lora_layer(getattr(parent, target_name), adapter_name, self.gate, name=current_key)

    def _add_heads(self, adapter_name: str, config: GatedLoraConfig) -> None:
        """Mask embeddings drawn like the base's own token embeddings, and the sampler head, both in float32."""
        embedding = self.model.get_input_embeddings()
        size = weight_shape(embedding)[1]
        masks = nn.Embedding(config.k, size)
        if masks.weight.device.type != "meta" and embedding.weight.device.type != "meta":
            with whole_weight(embedding) as table:
                sample = table.detach()[:: max(1, len(table) // 4096)].float().cpu()
            nn.init.normal_(masks.weight)
            masks.weight.data.mul_(sample.std(dim=0)).add_(sample.mean(dim=0))
        self.lora_mask_embeddings[adapter_name] = masks
        if config.sampler:
            self.lora_sampler_heads[adapter_name] = SamplerHead(
                size, config.base_hidden_size, residual=config.sampler_residual
            )

    def _sync_heads(self) -> None:
        """Places the heads and lets gradients into those of active adapters that are not for inference."""
        device = input_device(self.model)
        for heads in (self.lora_mask_embeddings, self.lora_sampler_heads):
            for name, head in heads.items():
                trainable = name in self.active_adapters and not self.peft_config[name].inference_mode
                head.requires_grad_(trainable)
                if device.type != "meta" and all(p.device.type != "meta" for p in head.parameters()):
                    head.to(device)

    # ---------------------------------------------------------------- what PEFT asks of a tuner

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        with untouched(self.model):
            super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._sync_heads()
        if inference_mode:
            self.lora_mask_embeddings.requires_grad_(False)
            self.lora_sampler_heads.requires_grad_(False)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        with untouched(self.model):
            super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for heads in (self.lora_mask_embeddings, self.lora_sampler_heads):
                if name in heads:
                    heads[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        with untouched(self.model):
            super().delete_adapter(adapter_name)
        for heads in (self.lora_mask_embeddings, self.lora_sampler_heads):
            heads.pop(adapter_name) if adapter_name in heads else None
        self._sync_heads()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        with untouched(self.model):
            super()._enable_adapter_layers(enabled)

    @property
    def adapters_disabled(self) -> bool:
        """Whether the adapter layers are switched off, as in `with model.disable_adapter():`."""
        # PEFT switches all layers alike, so the first one tells.
        return next((layer.disable_adapters for layer in self.model.modules() if is_gated(layer)), False)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs) -> nn.Module:
        if merge:
            self._refuse_merge()
        for hook in self._hooks:
            hook.remove()
        theirs = users_layers(self.model)
        base = super()._unload_and_optionally_merge(merge=False, **kwargs)
        restore(base, theirs)
        if self._users_configs:
            base.peft_config = self._users_configs
        return base

    def _refuse_merge(self, *args, **kwargs):
        """A gated LoRA cannot be merged.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "A gated LoRA cannot be merged: it acts on mask tokens only, and one merged weight would change regular "
            "tokens, and so the base model's output, too. Keep the adapter; `unload()` gives the base back as it was."
        )

    merge_adapter = add_weighted_adapter = _refuse_merge

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """As the base's own, with the gate restored wherever the backward pass runs a layer again.

        Raises:
            ValueError: Reentrant checkpointing is asked for, which cannot restore it.
        """
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise ValueError(
                "Gated LoRA layers need `use_reentrant=False`: reentrant checkpointing runs layers again without the "
                "gate of their forward pass. Set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        options["context_fn"] = self.gate.checkpoint_contexts
        # transformers 5.20, the last one for Python 3.10, has the older name only.
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        (enable or self.model.gradient_checkpointing_enable)(options, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """The older name of [`GatedLoraModel.activation_checkpointing_enable`]."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, **kwargs):
        """What is saved: weights of this adapter, not those of the user's own beneath it."""
        own = {key: tensor for key, tensor in state_dict.items() if f".{adapter_name}." in key}
        return super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, state_dict=own, **kwargs
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Refuses weights that are not a whole adapter; PEFT would leave what is missing at its random start."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = {
            key: tensor.shape
            for key, tensor in model.state_dict().items()
            if "lora_" in key and f".{adapter_name}." in key
        }
        missing, unknown = sorted(expected.keys() - remapped.keys()), sorted(remapped.keys() - expected.keys())
        wrong = [key for key, shape in expected.items() if key in remapped and remapped[key].shape != shape]
        broken = [key for key in expected if key in remapped and not torch.isfinite(remapped[key]).all()]
        for problem, keys in (
            ("lack", missing),
            ("have the unknown", unknown),
            ("have the wrong shape for", wrong),
            ("have values that are not finite in", broken),
        ):
            if keys:
                raise ValueError(
                    f"The adapter's weights {problem} {len(keys)} tensor(s), such as {keys[0]!r}: the file is "
                    "truncated, was changed, or belongs to another base or config. Download it again, or train again."
                )
        return remapped

    # ---------------------------------------------------------------- masks in the input

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

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """All trainable parameters: LoRA weights, mask embeddings, sampler head."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def draft(self, pending_B: torch.LongTensor, hidden_BKD: torch.Tensor, draw: Draw | None = None) -> Drafts:
        """What the active adapter drafts from the states of one block of masks per row.

        Args:
            pending_B (`torch.LongTensor` of shape `(B,)`): The token before the first draft.
            hidden_BKD (`torch.Tensor` of shape `(B, K, D)`): Last hidden states of the masks, in order.
            draw ([`Draw`], *optional*): Draws drafts at random; the likeliest are taken if `None`.
        """
        embedding = self.model.get_input_embeddings()
        return draft(pending_B, hidden_BKD, embedding, self.unembedding(), self.sampler_head(), draw)

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
        listener = self.gate.listener
        if listener is not None:
            listener.states = outputs.last_hidden_state.to(input_device(self.model))

    def _hold_unembedding(self, *_) -> None:
        """Forward pre-hook: training unembeds more often than the base does."""
        hold_in_forward(self, self.model.get_output_embeddings())

    # ---------------------------------------------------------------- forward passes

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        *args,
        mtp_recipe: Recipe | None = None,
        mtp_anchors: int | None = None,
        mtp_generator: torch.Generator | None = None,
        **kwargs,
    ):
        """The base's forward pass, in which ids V..V+k-1 are mask tokens; or, with a recipe, the training objective.

        Masks stand after all regular tokens, in the same columns of every row. The caller gives the attention mask and
        position ids that a layout needs; without, the input is a plain causal sequence.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, N)`): Token ids.
            mtp_recipe ([`Recipe`], *optional*): If given, the result is an [`Objective`], and `kwargs` may have
                `labels`, `attention_mask` (2-D, of right-padded rows) and `position_ids`.
            mtp_anchors, mtp_generator: See [`training_layout`].
            args, kwargs: What the base's `forward` takes.

        Raises:
            ValueError: Ids above V+k-1, a regular token after a mask, or a column with masks in some rows only.
        """
        if mtp_recipe is not None:
            return self._objective(input_ids, mtp_recipe, mtp_anchors, mtp_generator, **kwargs)
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

    def _objective(
        self, input_ids, recipe, anchors, generator, labels=None, attention_mask=None, position_ids=None, **kwargs
    ) -> Objective:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        labels = input_ids if labels is None else labels
        segment_BT = segments(attention_mask, position_ids)
        layout = training_layout(
            labels,
            position_ids,
            segment_BT,
            self.active_mtp_config.k,
            anchors,
            generator,
            same_in_all_rows=not self._reads_branches(),
        )
        if is_sharded(self) and not (layout.target_columns(labels) != IGNORE).any():
            # Nothing to learn from here, but other processes wait in every layer for this one.
            spare = self._objective(input_ids.new_zeros(1, 3), recipe, None, None)
            return Objective(spare.loss * 0.0, {}, 0)
        return multi_token_objective(self, input_ids, labels, layout, recipe)

    def masked_states(
        self, input_ids_BT: torch.LongTensor, layout: BlockLayout, all_layers: bool = False
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Hidden states of regular tokens and of masks, for training.

        Regular tokens depend on frozen weights only. They run first, without a graph, and masks read their keys and
        values from a cache, a few blocks per row. Layers under gradient checkpointing take no cache: then both run in
        one pass. A model that takes no branches reads each block as a sequence, behind the tokens up to its anchor.

        Args:
            input_ids_BT (`torch.LongTensor` of shape `(B, T)`): Regular tokens.
            layout ([`BlockLayout`]): The blocks that follow them.
            all_layers (`bool`, *optional*, defaults to `False`): Whether to return the states between layers too.

        Returns:
            Two lists, in the order of the layers, of `torch.Tensor` of shape `(B, T, D)` and `(B, M, D)`. The last of
            each is what the base's unembedding reads.

        Raises:
            ValueError: The base's attention implementation takes no 4-D mask.
        """
        refuse_attention_without_masks(self.model)
        if not self._reads_branches():
            return self._states_of_sequences(input_ids_BT, layout, all_layers)
        length = input_ids_BT.shape[1]
        if self.model.training and _is_checkpointing(self.model):
            with self.masks_in_columns(length, layout.index_BM):
                states = self._decoder_states(self._with_mask_ids(input_ids_BT, layout), layout, None, all_layers)
            return [state[:, :length] for state in states], [state[:, length:] for state in states]

        cache = DynamicCache()
        with torch.no_grad():
            regular = self._decoder_states(input_ids_BT, layout.without_masks(), cache, all_layers)
        split = layout.split_rows(BLOCKS_PER_ROW * self.active_mtp_config.k)
        cache.batch_repeat_interleave(len(split.anchor_BM) // len(layout.anchor_BM))
        with self.masks_in_columns(0, split.index_BM):
            masks = self._decoder_states(split.index_BM + self.vocab_size, split, cache, all_layers)
        # Rows were filled up with masks that no one needs, which are dropped here.
        return regular, [state.reshape(len(input_ids_BT), -1, state.shape[-1])[:, : layout.masks] for state in masks]

    def _reads_branches(self) -> bool:
        return reading_of(self) is Reading.BRANCHES

    def _states_of_sequences(
        self, input_ids_BT: torch.LongTensor, layout: BlockLayout, all_layers: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The same as `masked_states`, of blocks that hang on the same columns in all rows: a pass for each block."""
        if layout.segment_BT.max() > 0:
            raise ValueError(
                f"{type(self.model).__name__} reads one sequence per row, but the batch is packed: rows hold several "
                "texts. Set packing=False."
            )

        if is_sharded(self):
            raise NotImplementedError(
                f"{type(self.model).__name__} reads each block of masks in a pass of its own. Processes that hold "
                "parts of its weights would wait for each other for ever, differing in how many blocks they have. "
                "Train with whole weights in every process: DDP or DeepSpeed ZeRO-2."
            )

        def states(input_ids: torch.LongTensor) -> list[torch.Tensor]:
            outputs = decoder_of(self.model)(input_ids=input_ids, use_cache=False, output_hidden_states=all_layers)
            return [*(outputs.hidden_states[:-1] if all_layers else ()), outputs.last_hidden_state]

        k = self.active_mtp_config.k
        with torch.no_grad():
            regular = states(input_ids_BT)
        blocks = []
        for anchor in layout.anchor_BM[0, ::k].tolist():
            index_Bk = layout.index_BM[:, :k]
            sequence = torch.cat([input_ids_BT[:, : anchor + 1], index_Bk + self.vocab_size], dim=1)
            with self.masks_in_columns(anchor + 1, index_Bk):
                blocks.append([layer[:, anchor + 1 :] for layer in states(sequence)])
        return regular, [torch.cat(layer, dim=1) for layer in zip(*blocks, strict=True)]

    def _decoder_states(
        self, input_ids_BQ: torch.LongTensor, layout: BlockLayout, cache: Cache | None, all_layers: bool
    ) -> list[torch.Tensor]:
        """States, `(B, Q, D)` each, of the last Q columns of a layout; the cache has the columns before."""
        queries, device_type = input_ids_BQ.shape[1], input_ids_BQ.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else self.model.dtype
        decoder = decoder_of(self.model)
        outputs = decoder(
            input_ids=input_ids_BQ,
            attention_mask=attention_masks(layout, self._attention_kinds(), dtype, queries=queries),
            position_ids=layout.position_BN[:, -queries:],
            use_cache=cache is not None,
            output_hidden_states=all_layers,
            **{cache_name(inspect.signature(decoder.forward).parameters): cache},
        )
        states = [*(outputs.hidden_states[:-1] if all_layers else ()), outputs.last_hidden_state]
        return [state.to(input_ids_BQ.device) for state in states]

    def mask_embeddings(self, index_BM: torch.LongTensor) -> torch.Tensor:
        """`(B, M, E)`: what the active adapter embeds masks `index_BM` as."""
        return self.lora_mask_embeddings[self.active_adapters[0]](index_BM)

    def _with_mask_ids(self, input_ids_BT: torch.LongTensor, layout: BlockLayout) -> torch.LongTensor:
        return torch.cat([input_ids_BT, layout.index_BM + self.vocab_size], dim=1)

    def _attention_kinds(self):
        return attention_kinds(self.model.config.get_text_config(decoder=True))


def _is_checkpointing(model: nn.Module) -> bool:
    """Whether layers run again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
