"""The tuner: gated LoRA on the layers of a frozen base, mask embeddings and a sampler head, as PEFT manages them.

It extends PEFT's LoRA tuner through public interfaces: LoRA variants for the gate, tuner-level modules for the two
heads. It knows nothing of generation or of losses.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..base.distributed import hold_in_forward, past_sharding, whole_weight
from ..base.inspection import decoder_of, device_of, input_device, is_checkpointing, refuse_unsupported, weight_shape
from ..base.lora_layers import exclude_layers_out_of_reach, linear_layers, shortened
from .base_match import refuse_other_base
from .config import GatedLoraConfig
from .gate import Gate, HiddenStateCapture, MaskColumns, gate_lora_layer
from .parameters import gate_parameter
from .sampler import SamplerHead
from .stacked import UsersLayer, is_gated, refuse_name, refuse_parameter, restore, untouched, users_layers
from .weights import refuse_weights_unlike


class GatedLoraTuner(LoraModel):
    """A PEFT tuner whose LoRA acts at mask positions only. The base alone computes regular tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base, frozen.
        peft_config ([`GatedLoraConfig`]): The adapter.
        adapter_name (`str`): Its name.

    Attributes:
        vocab_size (`int`): V, ids of the base's vocabulary.
        active_mtp_config ([`GatedLoraConfig`]): Configuration of the active adapter.
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
        if is_checkpointing(model):  # switched on before the upgrade: once more, with the gate
            self.activation_checkpointing_enable()

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if isinstance(target, BaseTunerLayer) and not is_gated(target):
            refuse_parameter(target, kwargs.get("parameter_name"))
            target = UsersLayer(target)
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )
        layer = getattr(parent, target_name)
        if isinstance(layer, ParamWrapper):
            gate_parameter(layer, self.gate)
        elif "parameter_name" not in kwargs:  # else one that is gated has weights of another adapter now
            gate_lora_layer(layer, adapter_name, self.gate, name=current_key)

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
                size, config.base_hidden_size, config.sampler_residual, config.sampler_recurrent
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
        if config.save_dtype is not None:
            own = {key: tensor.to(getattr(torch, config.save_dtype)) for key, tensor in own.items()}
        return super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, state_dict=own, **kwargs
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Refuses weights that are not this adapter's; PEFT would leave what is missing at its random start."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # PEFT saves the sampler head, a module of several layers, under the name that the adapter had then.
        remapped = {re.sub(r"(?<=lora_sampler_heads\.)[^.]+", adapter_name, key): t for key, t in remapped.items()}
        expected = {key: t for key, t in model.state_dict().items() if "lora_" in key and f".{adapter_name}." in key}
        refuse_weights_unlike(remapped, expected)
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

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """All trainable parameters: LoRA weights, mask embeddings, sampler head."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

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

    def mask_embeddings(self, index_BM: torch.LongTensor) -> torch.Tensor:
        """`(B, M, E)`: what the active adapter embeds masks `index_BM` as."""
        return self.lora_mask_embeddings[self.active_adapters[0]](index_BM)

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
