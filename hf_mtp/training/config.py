"""How an adapter is trained: [`MTPConfig`]."""

from dataclasses import dataclass, field, fields

from transformers import TrainingArguments
from transformers.utils import logging
from trl import SFTConfig

from ..objective.losses import DIVERGENCES
from ..objective.recipe import TARGETS, Recipe, get_recipe
from .recovery.nonfinite import NONFINITE

logger = logging.get_logger(__name__)

# Settings of TRL and transformers that change how regular tokens are learned, with the values that change nothing.
_OF_REGULAR_TOKENS = {
    "label_smoothing_factor": 0.0,
    "loss_type": "nll",
    "neftune_noise_alpha": None,
    "router_aux_loss_coef": None,
}
_OF_THE_BASE = ("mean_token_accuracy", "entropy")  # measures of SFTTrainer that no training of masks changes
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
            Named set of loss weights and targets: `"default"`, or `"paper"` for those of Samragh et al.,
            arXiv 2507.11851. The parameters below override single entries of it.
        targets (`str`, *optional*):
            What masks learn to predict: `"model"`, the base's own likeliest token, which is what a draft must match to
            be accepted; `"soft"`, the base's whole distribution; or `"data"`, the token of the text.
        base_weight, sampler_weight, lcm_weight, auxiliary_weight (`float`, *optional*):
            Weights of the four losses. The base and the auxiliary one are not computed if their weight is 0. Without a
            sampler head, the base's cross-entropy takes its place.
        position_decay (`float`, *optional*):
            Weight of each mask relative to the one before it.
        divergence (`str`, *optional*):
            What the base and the sampler loss measure against the target: `"kl"`, cross-entropy; or `"tv"`, total
            variation, which is one minus the probability that a draft is accepted when sampling.

        > Parameters that control the layout

        anchors_per_sequence (`int`, *optional*, defaults to `64`):
            How many tokens of each sequence get a block of masks at most, drawn anew each time the sequence is seen.
            `None` for all tokens inside the loss. Blocks of longer sequences count more, so that every token counts
            the same.
        eval_anchors_per_sequence (`int`, *optional*):
            The same in evaluation. With `None`, a block on every token, `eval_tokens_per_step` is what decoding the
            evaluated texts would give; models that take no branches draw `anchors_per_sequence` then.

        > Parameters that control memory

        masks_per_part (`int`, *optional*, defaults to `1024`):
            How many mask tokens go forward and backward at a time. More take more memory, and fill a large GPU better.
            Where parameters are sharded, and under gradient checkpointing, all go at once.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether layers run again in the backward pass. Not needed to bound memory: `masks_per_part` does,
            without computing them twice.

        > Parameters that control the optimizer

        learning_rate (`float`, *optional*, defaults to `1e-3`):
            AdamW's.
        muon (`bool`, *optional*, defaults to `True`):
            Whether LoRA's matrices are trained by Muon and the rest by AdamW. AdamW trains all if parameters are
            sharded (DeepSpeed, FSDP), and `optim`, if set, or an optimizer passed to the trainer are used instead.
        muon_learning_rate (`float`, *optional*, defaults to `5e-3`):
            Muon's. The schedule drives both.

        > Parameters that control the length of the training

        max_minutes (`float`, *optional*):
            Ends training after this time, if epochs or `max_steps` do not end it before, and makes the learning rate
            schedule follow the clock. For budgets that are time and not steps.

        > Parameters that control what happens when something goes wrong

        nonfinite (`str`, *optional*, defaults to `"raise"`):
            What to do if a loss or a gradient is NaN or infinite: `"raise"` ends training with a report of the batch
            before the step is taken; `"skip"` leaves the step out, all its accumulated batches in all processes,
            warns, and counts it in the logs as `skipped_steps`. DeepSpeed takes steps by itself and skips none.

        > Parameters that control what is written

        training_curves (`bool`, *optional*, defaults to `True`):
            Whether to draw the losses, tokens per step and accuracies into `training_curves.png` in the output folder,
            at each save and at the end. Needs matplotlib, and is left out without it.

    Raises:
        ValueError: An unknown recipe, negative weights, anchors below 1, an unknown `nonfinite`; or a setting that is
            about learning from regular tokens: label smoothing, `loss_type`, NEFTune, the loss of a router, or a best
            model chosen by a measure of the base.
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
        metadata={"help": "What losses measure against the target: 'kl' or 'tv'.", "choices": [*DIVERGENCES]},
    )
    anchors_per_sequence: int | None = field(
        default=64, metadata={"help": "How many tokens of each sequence get a block of masks at most."}
    )
    eval_anchors_per_sequence: int | None = field(
        default=None, metadata={"help": "The same in evaluation; all tokens by default."}
    )
    masks_per_part: int = field(
        default=1024, metadata={"help": "How many mask tokens go forward and backward at a time."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Whether layers run again in the backward pass."}
    )
    muon: bool = field(default=True, metadata={"help": "Whether LoRA's matrices are trained by Muon."})
    muon_learning_rate: float = field(default=5e-3, metadata={"help": "The initial learning rate of Muon."})
    max_minutes: float | None = field(
        default=None, metadata={"help": "Ends training after this time; the learning rate follows the clock."}
    )
    nonfinite: str = field(
        default="raise",
        metadata={
            "help": "What to do if a loss or a gradient is not finite: 'raise' or 'skip'.",
            "choices": [*NONFINITE],
        },
    )

    training_curves: bool = field(
        default=True, metadata={"help": "Whether to draw training_curves.png in the output folder."}
    )

    def __post_init__(self):
        metric = self.metric_for_best_model or ""
        if self.greater_is_better is None and metric.endswith(_LOSSES):
            self.greater_is_better = False  # transformers takes it for a loss only if it ends in "loss"
        super().__post_init__()
        self._refuse_regular_tokens()
        for name in ("base_weight", "sampler_weight", "lcm_weight", "auxiliary_weight", "position_decay"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"`{name}` must not be negative, but got {value}.")
        if self.targets not in (None, *TARGETS):
            raise ValueError(f"`targets` must be one of {', '.join(map(repr, TARGETS))}, but got {self.targets!r}.")
        if self.divergence not in (None, *DIVERGENCES):
            raise ValueError(
                f"`divergence` must be one of {', '.join(map(repr, DIVERGENCES))}, but got {self.divergence!r}."
            )
        for name in ("anchors_per_sequence", "eval_anchors_per_sequence"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, or None for all, but got {value}.")
        if self.muon_learning_rate < 0:
            raise ValueError(f"`muon_learning_rate` must not be negative, but got {self.muon_learning_rate}.")
        if self.masks_per_part < 1:
            raise ValueError(f"`masks_per_part` must be at least 1, but got {self.masks_per_part}.")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"`max_minutes` must be positive, or None for no limit, but got {self.max_minutes}.")
        if self.max_minutes is not None and self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"`max_minutes` makes the learning rate follow the clock, but `lr_scheduler_type="
                f"{str(self.lr_scheduler_type.value)!r}` follows the losses. Choose another, such as 'linear'."
            )
        if self.nonfinite not in NONFINITE:
            raise ValueError(
                f"`nonfinite` must be one of {', '.join(map(repr, NONFINITE))}, but got {self.nonfinite!r}."
            )
        self.resolved_recipe()

    def _refuse_regular_tokens(self) -> None:
        for name, neutral in _OF_REGULAR_TOKENS.items():
            value = getattr(self, name)
            if value and value != neutral:
                raise ValueError(
                    f"`{name}={value!r}` changes how a model learns from regular tokens, but multi-token prediction "
                    f"trains masks, and the base stays as it is. Leave `{name}` at {neutral!r}."
                )
        self.router_aux_loss_coef = 0.0  # else TRL switches it on in the base's own config
        metric = self.metric_for_best_model or ""
        if metric.removeprefix("eval_") in _OF_THE_BASE:
            raise ValueError(
                f"`metric_for_best_model={metric!r}` is a measure of the base, which training leaves as it is: by "
                "it, all checkpoints are equal. Use 'loss', 'tokens_per_step' or 'accuracy_1'."
            )

    @classmethod
    def from_arguments(cls, args: TrainingArguments) -> "MTPConfig":
        """The same settings as an [`MTPConfig`]; [`~trl.SFTTrainer`] takes other classes, too.

        Args:
            args ([`~transformers.TrainingArguments`]): Any of these, [`~trl.SFTConfig`] and its subclasses included.

        Raises:
            TypeError: They are no training arguments, or those of a trainer of another kind.
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
        values |= {key: getattr(args, key) for key in values if key.endswith("_token")}  # which `to_dict` hides
        config = cls(**values)
        for key in foreign:  # of a subclass of the user's
            setattr(config, key, getattr(args, key))
        for known in fields(args):
            value, default = getattr(args, known.name), own[known.name].default if known.name in own else known.default
            if known.name in ("learning_rate", "gradient_checkpointing") and value == known.default != default:
                logger.warning(
                    f"`{known.name}={value!r}` is the default of {name}. That of MTPConfig, which is made for masks, "
                    f"is {default!r}."
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
