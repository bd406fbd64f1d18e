"""[`MTPTrainer`]: TRL's supervised fine-tuning with the multi-token objective."""

import shutil
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from .deadline import TICKS, Deadline
from .fingerprint import tokenizer_fingerprint
from .interrupt import SaveOnInterrupt
from .layout import IGNORE
from .objective import Objective
from .optimizer import make_muon_adamw
from .peers import whole_adapter
from .support import unpack_for_gradients
from .training_config import MTPConfig
from .tuner import GatedLoraModel

EVAL_SEED = 0  # evaluation draws the same anchors every time


class MTPTrainer(SFTTrainer):
    """
    Trains the adapter of an upgraded model.

    A [`~trl.SFTTrainer`] in all but its loss: every dataset format that TRL takes goes in unchanged, and saving,
    resuming, evaluation and reporting are those of [`~transformers.Trainer`]. Checkpoints hold the adapter, not the
    base. Logs each loss (`loss_base`, `loss_sampler`, `loss_lcm`, `loss_auxiliary`), the accuracy of each mask
    position against the base's own choice (`accuracy_1` ... `accuracy_k`) and `tokens_per_step`, what decoding would
    give on the same text; with the prefix `eval_` in evaluation.

    Args:
        model ([`~peft.PeftModel`]):
            The model to train, from `get_peft_model(base, GatedLoraConfig(...))`; or a base model (or its name),
            together with `peft_config=GatedLoraConfig(...)`.
        args ([`MTPConfig`], *optional*):
            Configuration of the training.
        kwargs:
            Everything else that [`~trl.SFTTrainer`] takes, except `compute_loss_func`.

    Raises:
        ValueError: The model was not upgraded, the dataset is empty or has nothing to learn from, `max_length` leaves
            no room for a block, or `compute_loss_func` is given.

    Example:

    ```python
    >>> from hf_mtp import GatedLoraConfig, MTPConfig, MTPTrainer

    >>> model = get_peft_model(base, GatedLoraConfig(k=8))
    >>> trainer = MTPTrainer(model=model, args=MTPConfig(output_dir="out"), train_dataset=dataset)
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "sft", "hf_mtp", "multi-token-prediction"]
    _name = "MTP"
    _paper = {
        "title": "Your LLM Knows the Future: Uncovering Its Multi-Token Prediction Potential",
        "id": "2507.11851",
    }

    def __init__(self, model, args: MTPConfig | None = None, train_dataset=None, **kwargs):
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("`compute_loss_func` would replace the multi-token objective: leave it out.")
        if isinstance(train_dataset, Dataset) and len(train_dataset) == 0:
            raise ValueError("`train_dataset` is empty: multi-token prediction needs at least one text to learn from.")
        if args is None:
            args = MTPConfig(output_dir="mtp_output")
        if kwargs.get("peft_config") is None:
            _gated(model)
        self.deadline = Deadline(args.max_minutes) if args.max_minutes is not None else None
        if _uses_muon(args, kwargs):
            settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "eps": args.adam_epsilon}
            settings["betas"] = (args.adam_beta1, args.adam_beta2)
            kwargs["optimizer_cls_and_kwargs"] = (make_muon_adamw, settings)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        tuner = _gated(self.model)
        unpack_for_gradients(self.model)
        k = tuner.active_mtp_config.k
        if args.max_length is not None and args.max_length < k + 2:
            raise ValueError(
                f"`max_length={args.max_length}` leaves no room for a token, the one after it and the {k} that its "
                f"masks predict: set it to at least k + 2 = {k + 2}."
            )
        self.recipe = args.resolved_recipe()
        self._refuse_nothing_to_learn()
        self._describe_training(tuner)
        # The loss is a mean over masks, not a sum over label tokens: let Trainer average accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.interrupt = SaveOnInterrupt()
        self.add_callback(self.interrupt)
        if self.deadline is not None:
            self.add_callback(self.deadline)

    def _refuse_nothing_to_learn(self) -> None:
        """Raises unless some sequence has a token inside the loss with one more two tokens on."""
        if not isinstance(self.train_dataset, Dataset):
            return  # a stream: found out while training
        for row in self.train_dataset:
            labels = row.get("labels", row["input_ids"])
            if any(here != IGNORE and there != IGNORE for here, there in zip(labels, labels[2:], strict=False)):
                return
        raise ValueError(
            "No sequence of `train_dataset` has three tokens inside the loss, so there is nothing for a mask to "
            f"predict. Are they all prompt, or truncated to their prompt by `max_length={self.args.max_length}`?"
        )

    def _describe_training(self, tuner: GatedLoraModel) -> None:
        """Records in the adapter's config what its card and a later load need to know."""
        config = tuner.active_mtp_config
        config.tokenizer_fingerprint = tokenizer_fingerprint(self._tokenizer)
        config.recipe = self.args.recipe
        name = getattr(getattr(self.train_dataset, "info", None), "dataset_name", None)
        if name and name not in config.train_datasets:
            config.train_datasets = [*config.train_datasets, name]

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.deadline is None:
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler = super().create_scheduler(TICKS, optimizer)
        self.deadline.drive(scheduler)
        return scheduler

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:  # also when training failed, and no callback hears of its end
            self.interrupt.restore_handler()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        generator = None
        if not self.model.training:
            generator = torch.Generator(inputs["input_ids"].device).manual_seed(EVAL_SEED)
        objective: Objective = model(
            **{name: inputs.get(name) for name in ("input_ids", "labels", "attention_mask", "position_ids")},
            mtp_recipe=self.recipe,
            mtp_anchors=self.args.anchors_per_sequence,
            mtp_generator=generator,
        )
        self._record(objective, inputs)
        # Releases of transformers differ in what they read from the outputs; with the loss alone all are content.
        return (objective.loss, {"loss": objective.loss}) if return_outputs else objective.loss

    def _record(self, objective: Objective, inputs: dict) -> None:
        """Averages over the steps between two logs are made by [`~trl.SFTTrainer`]'s `log`."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        if objective.metrics:
            for name, value in zip(
                objective.metrics, torch.stack(list(objective.metrics.values())).tolist(), strict=True
            ):
                metrics[name].append(value)
        if self.model.training:
            self._total_train_tokens += inputs["input_ids"].numel()
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics["mask_tokens"].append(objective.rows)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # There are no logits to hand to `compute_metrics`: the objective never has those of a whole batch.
        return super().prediction_step(model, inputs, True, ignore_keys)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.accelerator.is_fsdp2:
            return super().save_model(output_dir, _internal_call)
        # Whatever the type of state dict: the adapter whole, in one file, and none of the base gathered for it.
        self._save(output_dir, state_dict=whole_adapter(self.model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model, trial):
        """A checkpoint is there whole or not at all: what a failed save (a full disk) leaves is removed."""
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes the adapter's own model card into `output_dir`."""
        if self.is_world_process_zero():
            _gated(self.model).active_mtp_config.write_model_card(self.args.output_dir, repo=self.hub_model_id)


def _uses_muon(args: MTPConfig, kwargs: dict) -> bool:
    """Whether nothing else was asked for and matrices are whole."""
    own_optimizer = kwargs.get("optimizer_cls_and_kwargs") or (kwargs.get("optimizers") or (None,))[0]
    default_optim = MTPConfig.__dataclass_fields__["optim"].default
    chosen = own_optimizer is not None or (default_optim is not None and args.optim != default_optim)
    sharded = bool(args.deepspeed or args.fsdp)
    return args.muon and not chosen and not sharded and hasattr(torch.optim, "Muon")


def _gated(model) -> GatedLoraModel:
    """The tuner inside an upgraded model."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, GatedLoraModel):
        raise ValueError(
            f"MTPTrainer trains upgraded models, but got {type(model).__name__}. Upgrade it first, "
            "`model = get_peft_model(model, GatedLoraConfig(k=8))`, or pass `peft_config=GatedLoraConfig(k=8)`."
        )
    return tuner
