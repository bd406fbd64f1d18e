"""[`MTPConfig`]: training settings and their checks. Knows nothing of data or losses."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from numbers import Integral, Real

from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging
from trl import SFTConfig

from ..objective.losses import DIVERGENCES
from ..objective.recipe import TARGETS, Recipe, get_recipe
from .recovery.nonfinite import NONFINITE

logger = logging.get_logger(__name__)

# Settings of TRL and transformers that affect learning from regular tokens, with their neutral values.
_REGULAR_TOKEN_SETTINGS = {
    "label_smoothing_factor": 0.0,
    "loss_type": "nll",
    "neftune_noise_alpha": None,
    "router_aux_loss_coef": None,
}
_BASE_METRICS = ("mean_token_accuracy", "entropy")  # SFTTrainer's measures of the base, which training never changes
_WEIGHTS = ("base_weight", "sampler_weight", "lcm_weight", "auxiliary_weight", "position_decay")
_LOSSES = ("loss_base", "loss_sampler", "loss_lcm", "loss_auxiliary")


@dataclass
class MTPConfig(SFTConfig):
    r"""
    Configuration class for the [`MTPTrainer`].

    This class includes only the parameters that are specific to multi-token prediction. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] and [`~trl.SFTConfig`] documentation. Note that
    default values in this class may differ from those in [`~trl.SFTConfig`].

    Args:
        > Parameters that control the objective

        recipe (`str`, *optional*, defaults to `"default"`):
            Named set of loss weights and targets: `"default"`, or `"paper"` for those of Samragh et al., arXiv
            2507.11851; see [`Recipe`]. The parameters below override single entries; those that are `None` keep the
            recipe's value.
        targets (`str`, *optional*):
            What masks learn to predict: `"model"`, the base's most likely token, which a draft must match to be
            accepted; `"soft"`, the base's full distribution; or `"data"`, the token of the dataset.
        base_weight, sampler_weight, lcm_weight, auxiliary_weight (`float`, *optional*):
            Weights of the four losses. The base and the auxiliary loss are not computed if their weight is 0. Without
            a sampler head, the base loss replaces the sampler loss.
        position_decay (`float`, *optional*):
            Weight of each mask relative to the one before it.
        divergence (`str`, *optional*):
            Distance to the target in the base and the sampler loss: `"kl"`, cross-entropy; or `"tv"`, total variation,
            which is one minus the probability that rejection sampling accepts a draft.

        > Parameters that control the layout

        anchors_per_sequence (`int`, *optional*, defaults to `64`):
            Maximum number of tokens per sequence that get a block of masks, sampled each time the sequence is seen.
            `None` for all tokens inside the loss. Blocks of longer sequences get larger weights, so that every token
            counts the same.
        eval_anchors_per_sequence (`int`, *optional*):
            The same in evaluation. With `None`, every token gets a block, and `eval_tokens_per_step` is the value that
            decoding the evaluated texts would give. Models that cannot process branches then use
            `anchors_per_sequence`.

        > Parameters that control memory

        masks_per_part (`int`, *optional*, defaults to `1024`):
            Number of mask tokens per forward and backward pass. A larger number takes more memory and uses a large GPU
            better. With sharded parameters or gradient checkpointing, all masks are processed at once.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether to recompute layers in the backward pass. `masks_per_part` bounds memory without computing layers
            twice.

        > Parameters that control the optimizer

        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Initial learning rate of AdamW.
        muon (`bool`, *optional*, defaults to `True`):
            Whether Muon trains LoRA's matrices, and AdamW the rest. AdamW trains everything if parameters are sharded
            (DeepSpeed, FSDP). `optim`, or an optimizer passed to the trainer, overrides both.
        muon_learning_rate (`float`, *optional*, defaults to `5e-3`):
            Initial learning rate of Muon. Both rates follow the same schedule.

        > Parameters that control the length of the training

        max_minutes (`float`, *optional*):
            Time limit, for training on a time budget. Training ends after it unless epochs or `max_steps` end it
            earlier, and the learning rate schedule follows the clock.

        > Parameters that control what happens when something goes wrong

        nonfinite (`str`, *optional*, defaults to `"raise"`):
            What to do if a loss or a gradient is NaN or infinite. `"raise"` ends training with a report of the batch,
            before the optimizer step. `"skip"` skips the step with all its accumulated batches in all processes,
            warns, and logs the count as `skipped_steps`. It is not available with DeepSpeed.

        > Parameters that control the output

        training_curves (`bool`, *optional*, defaults to `True`):
            Whether to plot the losses, tokens per step and accuracies into `training_curves.png` in the output folder,
            at each save and at the end. Does nothing if matplotlib is not installed.

    Raises:
        ValueError: An unknown recipe, weights that are negative, not finite or all 0, anchors below 1, an unknown
            `nonfinite`; or a setting for learning from regular tokens: label smoothing, `loss_type`, NEFTune, a
            router loss, or a best model selected by a measure of the base.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate."})
    recipe: str = field(default="default", metadata={"help": "Named set of loss weights and targets."})
    targets: str | None = field(
        default=None,
        metadata={"help": "What masks learn to predict: 'model', 'soft' or 'data'.", "choices": [*TARGETS]},
    )
    base_weight: float | None = field(default=None, metadata={"help": "Weight of the base cross-entropy."})
    sampler_weight: float | None = field(default=None, metadata={"help": "Weight of the sampler cross-entropy."})
    lcm_weight: float | None = field(default=None, metadata={"help": "Weight of the latent consistency loss."})
    auxiliary_weight: float | None = field(default=None, metadata={"help": "Weight of the auxiliary loss."})
    position_decay: float | None = field(
        default=None, metadata={"help": "Weight of each mask relative to the one before it."}
    )
    divergence: str | None = field(
        default=None,
        metadata={"help": "Distance of drafts to their target: 'kl' or 'tv'.", "choices": [*DIVERGENCES]},
    )
    anchors_per_sequence: int | None = field(
        default=64, metadata={"help": "Maximum number of tokens per sequence that get a block of masks."}
    )
    eval_anchors_per_sequence: int | None = field(
        default=None, metadata={"help": "The same in evaluation; all tokens by default."}
    )
    masks_per_part: int = field(
        default=1024, metadata={"help": "Number of mask tokens per forward and backward pass."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Whether to recompute layers in the backward pass."}
    )
    muon: bool = field(default=True, metadata={"help": "Whether Muon trains LoRA's matrices."})
    muon_learning_rate: float = field(default=5e-3, metadata={"help": "The initial learning rate of Muon."})
    max_minutes: float | None = field(
        default=None, metadata={"help": "Time limit; the learning rate schedule follows the clock."}
    )
    nonfinite: str = field(
        default="raise",
        metadata={
            "help": "What to do if a loss or a gradient is not finite: 'raise' or 'skip'.",
            "choices": [*NONFINITE],
        },
    )
    training_curves: bool = field(
        default=True, metadata={"help": "Whether to plot training_curves.png in the output folder."}
    )

    def __post_init__(self):
        metric = self.metric_for_best_model or ""
        if self.greater_is_better is None and metric.endswith(_LOSSES):
            self.greater_is_better = False  # transformers recognizes a loss only by a name that ends in "loss"
        super().__post_init__()
        self._refuse_regular_token_settings()
        self._refuse_bad_numbers()
        for name, choices in (("targets", TARGETS), ("divergence", DIVERGENCES), ("nonfinite", NONFINITE)):
            value = getattr(self, name)
            if value not in choices and (value is not None or name == "nonfinite"):
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, but got {value!r}.")
        if self.max_minutes is not None and self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"`max_minutes` makes the learning rate follow the clock, but `lr_scheduler_type="
                f"{str(self.lr_scheduler_type.value)!r}` follows the losses. Choose another, such as 'linear'."
            )
        self._refuse_recipe_without_losses()

    def _refuse_bad_numbers(self) -> None:
        for name in (*_WEIGHTS, "muon_learning_rate"):
            value = getattr(self, name)
            if value is None and name in _WEIGHTS:
                continue
            if not _is_finite(value):
                raise ValueError(f"`{name}` must be a finite number, but got {value!r}.")
            if value < 0:
                raise ValueError(f"`{name}` must not be negative, but got {value}.")
        for name in ("anchors_per_sequence", "eval_anchors_per_sequence"):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                raise ValueError(f"`{name}` must be an integer of at least 1, or None for all, but got {value!r}.")
        if not _is_count(self.masks_per_part):
            raise ValueError(f"`masks_per_part` must be an integer of at least 1, but got {self.masks_per_part!r}.")
        if self.max_minutes is not None and not (_is_finite(self.max_minutes) and self.max_minutes > 0):
            raise ValueError(f"`max_minutes` must be positive, or None for no limit, but got {self.max_minutes!r}.")

    def _refuse_recipe_without_losses(self) -> None:
        recipe = self.resolved_recipe()
        if not any((recipe.base, recipe.sampler, recipe.lcm, recipe.auxiliary)):
            raise ValueError(
                "`base_weight`, `sampler_weight`, `lcm_weight` and `auxiliary_weight` are all 0, so there is no loss "
                "to learn from. Leave at least one of them out, or set it to a positive number."
            )

    def _refuse_regular_token_settings(self) -> None:
        for name, neutral in _REGULAR_TOKEN_SETTINGS.items():
            value = getattr(self, name)
            if value and value != neutral:
                raise ValueError(
                    f"`{name}={value!r}` changes how a model learns from regular tokens, but multi-token prediction "
                    f"trains only masks and never changes the base. Leave `{name}` at {neutral!r}."
                )
        self.router_aux_loss_coef = 0.0  # otherwise TRL enables the router loss in the base's config
        metric = self.metric_for_best_model or ""
        if metric.removeprefix("eval_") in _BASE_METRICS:
            raise ValueError(
                f"`metric_for_best_model={metric!r}` is a measure of the base, which training does not change, so "
                "all checkpoints have the same value. Use 'loss', 'tokens_per_step' or 'accuracy_1'."
            )

    @classmethod
    def from_arguments(cls, args: TrainingArguments) -> "MTPConfig":
        """Converts training arguments of another class, which [`~trl.SFTTrainer`] accepts too.

        Args:
            args ([`~transformers.TrainingArguments`]): Of this class or [`~trl.SFTConfig`] or a subclass.

        Raises:
            TypeError: `args` are not training arguments, or those of an unrelated trainer.
        """
        if isinstance(args, cls):
            return args
        if not isinstance(args, TrainingArguments):
            raise TypeError(f"`args` must be an MTPConfig, but got {type(args).__name__}.")
        own, name = {known.name: known for known in fields(cls)}, type(args).__name__
        foreign = [known.name for known in fields(args) if known.init and known.name not in own]
        if foreign and not isinstance(args, SFTConfig):
            raise TypeError(
                f"{name} has arguments of another trainer, such as {', '.join(map(repr, foreign[:5]))}, which "
                "MTPTrainer cannot follow. Pass an MTPConfig."
            )
        values = {key: value for key, value in args.to_dict().items() if key in own}
        values |= {key: getattr(args, key) for key in values if key.endswith("_token")}  # `to_dict` hides them
        config = cls(**values)
        for key in foreign:  # fields of the user's subclass of SFTConfig
            setattr(config, key, getattr(args, key))
        for known in fields(args):
            value, default = getattr(args, known.name), own[known.name].default if known.name in own else known.default
            if known.name in ("learning_rate", "gradient_checkpointing") and value == known.default != default:
                logger.warning(
                    f"`{known.name}={value!r}` is the default of {name}. That of MTPConfig, which suits training "
                    f"of masks, is {default!r}."
                )
        return config

    def resolved_recipe(self) -> Recipe:
        """The [`Recipe`] named by `recipe`, with the overrides given here."""
        return get_recipe(self.recipe).with_overrides(
            base=self.base_weight,
            sampler=self.sampler_weight,
            lcm=self.lcm_weight,
            auxiliary=self.auxiliary_weight,
            targets=self.targets,
            position_decay=self.position_decay,
            divergence=self.divergence,
        )


def _is_finite(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


@contextmanager
def router_config_restored(model: PreTrainedModel | str) -> Iterator[None]:
    """Restores the router settings in the base's config, where TRL switches the router loss off."""
    config = None if isinstance(model, str) else model.config.get_text_config()
    names = [name for name in ("output_router_logits", "router_aux_loss_coef") if hasattr(config, name)]
    before = [getattr(config, name) for name in names]
    yield
    for name, value in zip(names, before, strict=True):
        setattr(config, name, value)
