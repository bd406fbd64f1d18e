"""The configuration of an adapter: [`GatedLoraConfig`]."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

from peft import LoraConfig, PeftConfig, TaskType
from torch import nn

from .loading import load_ngrams, refuse_unsafe_file
from .ngram_table import NgramTable
from .peft_type import ExtensionPeftType, ExtensionTaskType

# Fields of LoraConfig that, when set, change what the base computes for regular tokens.
_CHANGE_THE_BASE = {
    "bias": "none",
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "kasa_config": None,
}
# Initialisations that keep the base's weights as they are; the others (PiSSA, OLoRA, CorDA, LoftQ ...) rewrite them.
_KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")
SAVE_DTYPES = ("float32", "bfloat16", "float16")
MASKS = ("learned", "noise")


def _require_positive_int(name: str, value: object, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1 ({meaning}), but got {value!r}.")


@dataclass
class GatedLoraConfig(LoraConfig):
    """Configuration of a multi-token prediction adapter: gated LoRA, k mask tokens and a sampler head.

    All fields of [`~peft.LoraConfig`] have the same meaning as there. The following fields are new or have other
    defaults.

    Args:
        k (`int`, *optional*, defaults to `8`):
            Number of mask tokens: how many tokens beyond the next one the model predicts.
        r (`int`, *optional*, defaults to `128`):
            Rank of the LoRA matrices.
        lora_alpha (`int`, *optional*, defaults to `256`):
            Numerator of the LoRA scale, `lora_alpha / r`.
        target_modules (`str | list[str]`, *optional*, defaults to `"all-linear"`):
            Layers that get a gated LoRA.
        masks (`"learned"` or `"noise"`, *optional*, defaults to `"learned"`):
            How masks are embedded: with learned embeddings, or as random tokens of the vocabulary, as in
            [Uno](https://huggingface.co/papers/2609.04010). With `"noise"` and without a sampler head, an adapter can
            be exported to Uno's format.
        sampler (`bool`, *optional*, defaults to `True`):
            Whether drafts come from a sampler head that sees the previous draft. Without it, each draft depends on the
            logits of its own mask only.
        sampler_residual (`bool`, *optional*, defaults to `True`):
            Whether the sampler head adds to the mask's hidden state. In the paper it replaces the hidden state.
        sampler_recurrent (`bool`, *optional*, defaults to `False`):
            Whether the sampler head also sees its own output for the previous mask, and so all earlier drafts.
        save_dtype (`str`, *optional*):
            Dtype of saved weights: `"bfloat16"` halves the file size. This may change some drafts, but never the
            output. If `None`, weights are saved in float32, as they are trained; training checkpoints always are.
        base_hidden_size, base_vocab_size (`int`, *optional*):
            Filled in from the base model. Loading the adapter on a base that differs raises an error.
        tokenizer_fingerprint (`str`, *optional*), tokenizer_size (`int`, *optional*):
            Filled in by [`MTPTrainer`]. Loading the adapter on a base whose tokenizer differs in ids below this size
            raises an error.
        recipe (`str`, *optional*), train_datasets (`list[str]`, *optional*):
            Filled in by [`MTPTrainer`], for the model card.
        tokens_per_pass (`dict[str, float]`, *optional*):
            Measured tokens per forward pass, by domain, for the model card. Set it before saving.

    Attributes:
        ngrams ([`NgramTable`] or `None`): The adapter's n-gram table, from which `mtp_strategy="auto"` drafts as well.
            It is not a field: it is saved and loaded as a file beside the weights.

    Raises:
        ValueError: `k` or `r` is not a positive integer, or a field would change the output of regular tokens.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from hf_mtp import GatedLoraConfig

    >>> model = get_peft_model(base, GatedLoraConfig(k=8, r=16))
    ```
    """

    # Whether gated layers run beside the base's layers instead of wrapping them, although the base has no adapters of
    # its own. Not a field, so it is not saved.
    beside = False
    ngrams: ClassVar[NgramTable | None] = None

    r: int = field(default=128, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=256, metadata={"help": "Numerator of the LoRA scale, lora_alpha / r."})
    target_modules: str | list[str] | None = field(
        default="all-linear", metadata={"help": "Layers that get a gated LoRA."}
    )
    k: int = field(
        default=8, metadata={"help": "Number of mask tokens: how many tokens beyond the next one the model predicts."}
    )
    masks: str = field(
        default="learned",
        metadata={
            "help": "How masks are embedded: 'learned' embeddings, or random tokens of the vocabulary ('noise')."
        },
    )
    sampler: bool = field(
        default=True, metadata={"help": "Whether drafts come from a sampler head that sees the previous draft."}
    )
    sampler_residual: bool = field(
        default=True, metadata={"help": "Whether the sampler head adds to the mask's hidden state or replaces it."}
    )
    sampler_recurrent: bool = field(
        default=False, metadata={"help": "Whether the sampler head also sees its own output for the previous mask."}
    )
    save_dtype: str | None = field(default=None, metadata={"help": "Dtype of saved weights."})
    base_hidden_size: int | None = field(default=None, metadata={"help": "Filled in from the base model."})
    base_vocab_size: int | None = field(default=None, metadata={"help": "Filled in from the base model."})
    tokenizer_fingerprint: str | None = field(default=None, metadata={"help": "Filled in by MTPTrainer."})
    tokenizer_size: int | None = field(default=None, metadata={"help": "Filled in by MTPTrainer."})
    recipe: str | None = field(default=None, metadata={"help": "Filled in by MTPTrainer."})
    train_datasets: list[str] = field(default_factory=list, metadata={"help": "Filled in by MTPTrainer."})
    tokens_per_pass: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Measured tokens per forward pass, by domain, for the model card."}
    )

    @classmethod
    def check_kwargs(cls, **kwargs):
        """Accepts the earlier name of a field in a saved config. PEFT passes what it read."""
        if "tokens_per_step" in kwargs:
            kwargs["tokens_per_pass"] = kwargs.pop("tokens_per_step")
        return super().check_kwargs(**kwargs)

    def __post_init__(self):
        _require_positive_int("r", self.r, "the rank of the LoRA matrices")  # before PEFT computes with it
        if self.task_type not in (None, TaskType.CAUSAL_LM, ExtensionTaskType.GATED_CAUSAL_LM):
            raise ValueError(
                f"`task_type` must be 'CAUSAL_LM', because masks predict next tokens, but got {self.task_type!r}."
            )
        if self.target_modules == "all-linear" and (self.layers_to_transform is not None or self.layers_pattern):
            raise ValueError(
                "`layers_to_transform` and `layers_pattern` choose among the layers that `target_modules` lists, but "
                "it is 'all-linear', the default. Pass a list, such as target_modules=['q_proj', 'v_proj'], or leave "
                "layers out with `exclude_modules`, a regular expression."
            )
        self.task_type = TaskType.CAUSAL_LM  # the only one of the two that PEFT's own check knows
        super().__post_init__()
        self.peft_type, self.task_type = ExtensionPeftType.GATED_LORA, ExtensionTaskType.GATED_CAUSAL_LM
        self.check()

    def check(self) -> None:
        """Checks the fields again, because they can be changed after the config was created.

        Raises:
            ValueError: `k` or `r` is not a positive integer, `masks` or `save_dtype` is unknown, or a field would
                change the output of regular tokens.
        """
        _require_positive_int("k", self.k, "the number of mask tokens")
        _require_positive_int("r", self.r, "the rank of the LoRA matrices")
        if self.masks not in MASKS:
            raise ValueError(
                "`masks` must be 'learned' (mask embeddings) or 'noise' (tokens of the vocabulary), but got "
                f"{self.masks!r}."
            )
        if self.save_dtype not in (None, *SAVE_DTYPES):
            raise ValueError(
                f"`save_dtype` must be one of {', '.join(map(repr, SAVE_DTYPES))}, or None for the dtype of "
                f"training, but got {self.save_dtype!r}."
            )
        for name, neutral in _CHANGE_THE_BASE.items():
            value = getattr(self, name, neutral)
            if value != neutral and value:
                raise ValueError(
                    f"`{name}={value!r}` would change what the base model computes for regular tokens, but a gated "
                    f"adapter must not change the base's output. Leave `{name}` at {neutral!r}."
                )
        if self.arrow_config is not None:
            raise ValueError(
                "`arrow_config` chooses one of several adapters for each token, but masks belong to a single adapter. "
                "Leave it out."
            )
        if self.init_lora_weights not in _KEEP_THE_BASE:
            raise ValueError(
                f"`init_lora_weights={self.init_lora_weights!r}` would change the base model's weights, but a gated "
                f"adapter must not change them. Use one of {', '.join(map(repr, _KEEP_THE_BASE))}."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        """Loads the configuration of an adapter. Raises if its weights are a pickle or, in a folder, broken.

        Args and returned value are those of [`~peft.PeftConfig.from_pretrained`].

        Raises:
            ValueError: The folder or repository has `adapter_model.bin` and no `adapter_model.safetensors`,
                the folder's `adapter_model.safetensors` is truncated, or the n-gram table is that of another model.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        # PEFT reads the config before it touches the base, and the weights afterwards: this is the last moment.
        refuse_unsafe_file(str(pretrained_model_name_or_path), subfolder, **kwargs)
        config.ngrams = load_ngrams(str(pretrained_model_name_or_path), subfolder, **kwargs)
        if config.ngrams is not None:
            config.ngrams.refuse_other_base(config.base_vocab_size)
        return config


def refuse_empty_heads(config: GatedLoraConfig) -> None:
    """Raises a `ValueError` if a new adapter would have a LoRA, but neither mask embeddings nor a sampler head."""
    is_new = config.base_hidden_size is None
    if is_new and config.init_lora_weights == "eva" and nn.Linear(1, 1).weight.is_meta:  # PEFT's `low_cpu_mem_usage`
        raise ValueError(
            "`low_cpu_mem_usage=True` makes an adapter without weights, and `init_lora_weights='eva'` gives it those "
            "of its LoRA only, not its mask embeddings and sampler head. Leave out `low_cpu_mem_usage`."
        )


def refuse_ungated(adapter_name: str, config: PeftConfig) -> None:
    """Raises a `ValueError` if an ordinary LoRA is to be added to a gated layer."""
    if config.peft_type != ExtensionPeftType.GATED_LORA:
        raise ValueError(
            f"Adapter {adapter_name!r} is not gated, but the model is already upgraded: in a gated layer it would act "
            "on masks only. Add the adapter to the base first and then upgrade, or call `unload()` first."
        )


class AdapterConfigs(dict[str, GatedLoraConfig]):
    """Configs of the adapters of an upgraded model, by name: gated ones only.

    If a model with adapters gets one of another type above them, PEFT adds its config here, in the place of one of the
    same name.

    Raises:
        ValueError: A config is not that of a gated adapter.
    """

    def __setitem__(self, adapter_name: str, config: PeftConfig) -> None:
        if not isinstance(config, GatedLoraConfig):
            raise ValueError(
                f"A {type(config).__name__} cannot add an adapter to an upgraded model, because the gated adapter and "
                "the new one would be mixed up. Add the adapter to the base first and then upgrade, or call "
                "`unload()` first."
            )
        super().__setitem__(adapter_name, config)

    def update(self, configs: dict[str, PeftConfig]) -> None:
        for adapter_name, config in configs.items():
            self[adapter_name] = config


@contextmanager
def in_full_precision(config: GatedLoraConfig) -> Iterator[None]:
    """Within the context, weights are saved in full precision, so that training can resume from them."""
    config.save_dtype, before = None, config.save_dtype
    try:
        yield
    finally:
        config.save_dtype = before
