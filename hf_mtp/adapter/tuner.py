"""The tuner: gated LoRA on the layers of a frozen base, mask embeddings and a sampler head, as PEFT manages them.

It extends PEFT's LoRA tuner through public interfaces: LoRA variants for the gate, tuner-level modules for the rest.
It knows nothing of generation or of losses.
"""

import re
from collections.abc import Container, Iterator

import torch
from accelerate.utils import align_module_device
from peft import PeftModel, functional
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from ..base.embedding import random_embedding
from ..base.head import PredictionHead, prediction_head
from ..base.inspection import input_device, is_checkpointing, refuse_unsupported, weight_shape
from ..base.lora_layers import exclude_layers_out_of_reach, linear_layers, refuse_layers_out_of_reach, shortened
from .base_identity import record_base, refuse_other_base
from .config import AdapterConfigs, GatedLoraConfig, refuse_empty_heads
from .gate import Gate, gate_lora_layer, is_gated, refuse_merge, ungated_layers
from .loading import refuse_to_save, refuse_weights_unlike
from .mask_input import MaskInput
from .names import refuse_adapter_name
from .noise_tokens import NoiseTokens
from .parameters import gate_parameter
from .sampler import SamplerHead
from .stacked import (
    branch,
    has_adapters,
    innermost,
    own_weights,
    refuse_layer_of_others,
    refuse_parameters,
    remove_layers,
    run_beside,
    with_file_names,
    with_model_names,
)

HALF = (torch.float16, torch.bfloat16)


class GatedLoraTuner(MaskInput, LoraModel):
    """A PEFT tuner whose LoRA acts at mask positions only. The base alone computes regular tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base, frozen.
        peft_config ([`GatedLoraConfig`]): The adapter.
        adapter_name (`str`): Its name.
    """

    # ---------------------------------------------------------------- building

    def __init__(self, model: nn.Module, peft_config, adapter_name: str, **kwargs):
        if not isinstance(peft_config, dict):  # of `inject_adapter_in_model`, which throws the tuner away
            raise ValueError(
                "A gated adapter needs a PeftModel for its mask embeddings and sampler head, but this call would "
                "inject it into the base alone: one of AutoModelForCausalLM.from_pretrained(adapter), "
                "`load_adapter` or `add_adapter` of a transformers model, or `inject_adapter_in_model`. Load it with "
                "AutoPeftModelForCausalLM.from_pretrained(adapter) or PeftModel.from_pretrained(base, adapter). "
                "Create a new one with get_peft_model(base, config)."
            )
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        theirs = base.__dict__.pop("peft_config", None)  # configs of other adapters, to which PEFT would add ours
        try:
            super().__init__(base, peft_config, adapter_name, **kwargs)
        finally:
            base.__dict__.pop("peft_config", None)
            if theirs is not None:
                base.peft_config = theirs
        self.peft_config = AdapterConfigs(self.peft_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, low_cpu_mem_usage: bool = False, **kwargs):
        config: GatedLoraConfig = self.peft_config[adapter_name]
        config.check()
        refuse_empty_heads(config)
        refuse_unsupported(model)
        refuse_adapter_name(adapter_name, model)
        is_first = "gate" not in self.__dict__
        head = prediction_head(model) if is_first else self.head
        refuse_other_base(config, model, head.hidden_size)
        is_stacked = config.beside or has_adapters(model) if is_first else self.is_stacked
        if is_stacked:
            refuse_parameters(config)
        self._resolve_targets(config, model, is_stacked)
        record_base(config, model, head.hidden_size)
        others = () if is_stacked else ungated_layers(model)
        if is_first:
            self._begin(model, head, is_stacked)
        try:
            super().inject_adapter(model, adapter_name, *args, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
        except Exception:
            self._withdraw(adapter_name, is_first, others)
            raise
        if is_first and is_stacked:
            model.requires_grad_(False)  # PEFT lets a second adapter train with the first
        with torch.device("meta") if low_cpu_mem_usage else torch.device("cpu"):
            self._add_heads(adapter_name, config)
        self._sync_heads()
        if is_checkpointing(model):  # switched on before the upgrade: once more, with the gate
            self.activation_checkpointing_enable()

    def _begin(self, model: nn.Module, head: PredictionHead, is_stacked: bool) -> None:
        """Makes what all adapters of this model share."""
        self.gate, self.head = Gate(), head
        self.lora_mask_embeddings, self.lora_sampler_heads, self.noise_tokens = (nn.ModuleDict() for _ in range(3))
        self.lora_layers = nn.Module() if is_stacked else None
        self._hooks = self._hook_base(model)

    def _resolve_targets(self, config: GatedLoraConfig, model: nn.Module, is_stacked: bool) -> None:
        """Chooses the layers of a new adapter; a saved one names them."""
        if config.target_modules == "all-linear":
            config.exclude_modules = exclude_layers_out_of_reach(config.exclude_modules, model)
            if is_stacked:  # whose adapters' own weights are linear layers, too
                config.target_modules = set(shortened(set(linear_layers(model)), model))
        elif config.base_hidden_size is None:
            self._prepare_adapter_config(config, self.get_model_config(model))  # PEFT's own choice if there is none
            refuse_layers_out_of_reach(config, model)

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        is_new = True
        if self.is_stacked:
            parent = branch(self.lora_layers, current_key.rpartition(".")[0])
            is_new = parent._modules.get(target_name) is None
            target = innermost(target) if is_new else getattr(parent, target_name)
        else:
            refuse_layer_of_others(target, current_key)
        # PEFT puts an adapter where the layer's weights are. Those that are offloaded are on the meta device.
        with align_module_device(innermost(target)):
            super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        layer = getattr(parent, target_name)
        if isinstance(layer, ParamWrapper):
            gate_parameter(layer, self.gate)
        elif "parameter_name" not in kwargs:  # else one that is gated has weights of another adapter now
            gate_lora_layer(layer, adapter_name, self.gate, name=current_key)
        if self.is_stacked and is_new:
            self._hooks.append(run_beside(layer, self.gate))

    def _withdraw(self, adapter_name: str, is_first: bool, others: Container[str]) -> None:
        """Removes an adapter that could not be added to all of its layers."""
        layers = {name: m for name, m in self._tree.named_modules() if isinstance(m, LoraLayer) and name not in others}
        for layer in layers.values():
            layer.delete_adapter(adapter_name)
        remove_layers(self._tree, {name: layer for name, layer in layers.items() if not layer.scaling})
        for hook in self._hooks if is_first else ():
            hook.remove()

    def _add_heads(self, adapter_name: str, config: GatedLoraConfig) -> None:
        """Mask embeddings or noise tokens, and the sampler head, in float32."""
        if config.masks == "noise":
            self.noise_tokens[adapter_name] = NoiseTokens(config.k, self.vocab_size)
        else:
            self.lora_mask_embeddings[adapter_name] = random_embedding(self.model, config.k)
        if config.sampler:
            size = weight_shape(self.model.get_input_embeddings())[1]
            self.lora_sampler_heads[adapter_name] = SamplerHead(
                size, config.base_hidden_size, config.sampler_residual, config.sampler_recurrent
            )

    def _heads(self, adapter_name: str) -> list[nn.Module]:
        """The mask embeddings and the sampler head of an adapter, as far as it has them."""
        kinds = (self.lora_mask_embeddings, self.lora_sampler_heads)
        return [heads[adapter_name] for heads in kinds if adapter_name in heads]

    def _sync_heads(self) -> None:
        """Places the heads and lets gradients into those of active adapters that are not for inference."""
        device = input_device(self.model)
        if device.type != "meta":
            self.noise_tokens.to(device)
        for name, config in self.peft_config.items():
            for head in self._heads(name):
                head.requires_grad_(name in self.active_adapters and not config.inference_mode)
                if device.type != "meta" and all(p.device.type != "meta" for p in head.parameters()):
                    head.to(device)

    # ---------------------------------------------------------------- what PEFT asks of a tuner

    @property
    def is_stacked(self) -> bool:
        """Whether the gated layers are beside the base, as where it has adapters of its own."""
        return self.lora_layers is not None

    @property
    def _tree(self) -> nn.Module:
        """Where the gated layers are, and no others."""
        return self.lora_layers if self.is_stacked else self.model

    def gated_layers(self) -> dict[str, LoraLayer]:
        """The layers with a gated LoRA, by the name that each has in the base."""
        return {name: layer for name, layer in self._tree.named_modules() if is_gated(layer)}

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """All trainable parameters: LoRA weights, mask embeddings, sampler head."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in self.gated_layers().values():  # and not the user's adapter of the same name on other layers
            functional.cast_adapter_dtype(layer, adapter_name, autocast_adapter_dtype)
        for head in self._heads(adapter_name):
            if not autocast_adapter_dtype or next(head.parameters()).dtype in HALF:
                head.to(torch.float32 if autocast_adapter_dtype else self.model.dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        for layer in self.gated_layers().values():  # and not those of the user's own adapter on other layers
            layer.set_adapter(adapter_name, inference_mode)
        self.active_adapter = adapter_name
        self._sync_heads()
        if inference_mode:
            self.lora_mask_embeddings.requires_grad_(False)
            self.lora_sampler_heads.requires_grad_(False)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        for layer in self.gated_layers().values():
            layer.set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for head in self._heads(name):
                head.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        del self.peft_config[adapter_name]
        was_active = adapter_name in self.active_adapters
        active = [name for name in self.active_adapters if name != adapter_name] or list(self.peft_config)[:1]
        for layer in self.gated_layers().values():
            layer.delete_adapter(adapter_name)
        if was_active and active:  # PEFT asks the first layer, which may have none of the others
            is_frozen = all(self.peft_config[name].inference_mode for name in active)
            self.set_adapter(active, is_frozen)
        self.active_adapter = active
        for heads in (self.lora_mask_embeddings, self.lora_sampler_heads, self.noise_tokens):
            if adapter_name in heads:
                del heads[adapter_name]
        self._sync_heads()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for layer in self.gated_layers().values():
            layer.enable_adapters(enabled)

    @property
    def adapters_disabled(self) -> bool:
        """Whether the adapter layers are switched off, as in `with model.disable_adapter():`."""
        return next((layer.disable_adapters for layer in self._tree.modules() if is_gated(layer)), False)  # all alike

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs) -> nn.Module:
        if merge:
            refuse_merge()
        for hook in self._hooks:
            hook.remove()
        remove_layers(self._tree, self.gated_layers())  # PEFT would remove the user's own adapters, too
        return self.model

    merge_adapter = add_weighted_adapter = refuse_merge

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

    # ---------------------------------------------------------------- files

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, **kwargs):
        """What is saved: weights of this adapter, under the names that they have on a base without adapters."""
        own = own_weights(state_dict, adapter_name, model.base_model)
        if config.save_dtype is not None:
            own = {key: tensor.to(getattr(torch, config.save_dtype)) for key, tensor in own.items()}
        refuse_to_save(own, config.save_dtype)
        own = super()._get_adapter_state_dict(model, config, adapter_name, own, **kwargs)
        return with_file_names(own, model.base_model)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Refuses weights that are not this adapter's; PEFT would leave what is missing at its random start."""
        state_dict = with_model_names(state_dict, model.base_model)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # PEFT saves the sampler head, a module of several layers, under the name that the adapter had then.
        remapped = {re.sub(r"(?<=lora_sampler_heads\.)[^.]+", adapter_name, key): t for key, t in remapped.items()}
        own = own_weights(model.state_dict(), adapter_name, model.base_model)
        refuse_weights_unlike(remapped, {key: t for key, t in own.items() if "lora_" in key})
        return remapped
