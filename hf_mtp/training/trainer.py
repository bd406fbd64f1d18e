"""[`MTPTrainer`]: TRL's supervised fine-tuning with the multi-token objective."""

from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers.utils import logging
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..adapter.base_identity import record_tokenizer
from ..adapter.card import write_model_card
from ..adapter.config import in_full_precision
from ..adapter.hub import fetch_card_by_hand
from ..base.distributed import whole_adapter
from ..base.inspection import auto_class, unpack_for_gradients
from ..model import GatedLoraModel
from ..objective.compute import Objective, batch_weight
from ..objective.request import ObjectiveRequest
from ..passes.speculation_mode import SpeculationMode, speculation_mode
from .batches import objective_inputs
from .callbacks.attach import attach_callbacks
from .callbacks.deadline import SCHEDULE_STEPS, Deadline
from .callbacks.interrupt import SaveOnInterrupt
from .config import MTPConfig, router_config_restored
from .data_checks import (
    refuse_datasets,
    refuse_ids,
    refuse_model,
    refuse_parameters,
    refuse_settings,
    refuse_without_targets,
    tuner_of,
)
from .evaluation import EvaluationMeasures, measures_of
from .optimizer import make_muon_adamw, refuse_optimizer_change, uses_muon
from .recovery.checkpoint import WholeCheckpoints, contents, newest_complete_checkpoint
from .recovery.compatibility import (
    describe,
    describe_objective,
    describe_steps,
    refuse_different_processes,
    refuse_incompatible_checkpoint,
    step_size_warning,
)
from .recovery.nonfinite import NonfiniteGuard
from .recovery.workers import is_worker_death, worker_death_message

logger = logging.get_logger(__name__)

EVAL_SEED = 0  # evaluation samples the same anchors every time


class MTPTrainer(WholeCheckpoints, SFTTrainer):
    """
    Trains the adapter of an upgraded model.

    An [`~trl.SFTTrainer`] with a different loss. It accepts every dataset format of TRL, and saves, resumes, evaluates
    and reports like [`~transformers.Trainer`]. Checkpoints hold the adapter, not the base. A process that is killed
    while it saves leaves no incomplete checkpoint.

    Logs each loss that has a weight (`loss_base`, `loss_sampler`, `loss_lcm`, `loss_auxiliary`), the accuracy of each
    mask position against the base's own choice (`accuracy_1` ... `accuracy_k`) and `tokens_per_step`, in evaluation
    with the prefix `eval_`. `eval_tokens_per_step` simulates quadratic decoding of the same text. In training,
    `tokens_per_step` is the mean over steps from random tokens, which is larger, because decoding takes more steps in
    hard stretches than in easy ones. In evaluation this mean is `eval_tokens_per_block`.

    Args:
        model ([`~peft.PeftModel`]):
            The model to train, from `get_peft_model(base, GatedLoraConfig(...))`; or a base model (or its name),
            together with `peft_config=GatedLoraConfig(...)`.
        args ([`MTPConfig`], *optional*):
            Training settings. Also accepts [`~transformers.TrainingArguments`] and [`~trl.SFTConfig`], see
            [`MTPConfig.from_arguments`].
        kwargs:
            Other arguments of [`~trl.SFTTrainer`], except `compute_loss_func`. `compute_metrics` gets the logits of
            regular tokens, which are the base's own.

    Raises:
        TypeError: `args` are those of an unrelated trainer.
        ValueError: The model was not upgraded, its adapter is not trainable or its base is, the dataset is empty,
            mixes formats or has nothing to learn from, `max_length` leaves no room for a block, the base cannot
            separate packed texts, or `compute_loss_func` is given. From `train`: the checkpoint belongs to another
            adapter or base, or processes train different ones.
        FloatingPointError: From `train`: a loss or a gradient is NaN or infinite, and `nonfinite="raise"`.

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
            raise ValueError("`compute_loss_func` would replace the multi-token objective. Omit it.")
        args = MTPConfig(output_dir="mtp_output") if args is None else MTPConfig.from_arguments(args)
        refuse_datasets(args, train_dataset, **kwargs)
        refuse_model(args, model, kwargs.get("peft_config"))
        self.deadline = Deadline(args.max_minutes) if args.max_minutes is not None else None
        with router_config_restored(model):
            super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self.uses_muon = uses_muon(self)
        tuner = self.tuner
        unpack_for_gradients(self.model)
        refuse_parameters(tuner)  # again, because TRL may have changed them
        refuse_settings(args, tuner)
        self.recipe = args.resolved_recipe()
        if isinstance(self.data_collator, DataCollatorForLanguageModeling):  # other collators make their own labels
            refuse_without_targets(self.train_dataset, self.eval_dataset, args.max_length)
        self._describe_training(tuner)
        # Trainer must not divide the loss by the number of accumulated batches: `get_batch_samples` gives the divisor.
        self.model_accepts_loss_kwargs = True
        self.evaluated = EvaluationMeasures()
        # Before the model is sharded or wrapped.
        self._adapter, self._objective = describe(tuner), describe_objective(self.recipe, args.anchors_per_sequence)
        self.guard = NonfiniteGuard(self, args.nonfinite)
        self.interrupt = SaveOnInterrupt()
        self.add_callback(self.interrupt)
        if self.deadline is not None:
            self.add_callback(self.deadline)
        attach_callbacks(self, curves=args.training_curves)

    @property
    def tuner(self) -> GatedLoraModel:
        """The tuner inside the model, however the model is wrapped."""
        return tuner_of(self.accelerator.unwrap_model(self.model))

    def _describe_training(self, tuner: GatedLoraModel) -> None:
        """Stores what the model card and a later load need in the adapter's config."""
        config = tuner.active_mtp_config
        record_tokenizer(config, self._tokenizer, tuner.model)
        config.base_vocab_size = tuner.vocab_size  # may have grown since the upgrade
        config.recipe = self.args.recipe
        info = getattr(self.train_dataset, "info", None)
        name = getattr(info, "dataset_name", None)
        if name and name not in (info.builder_name, *config.train_datasets):  # a file's is that of its format
            config.train_datasets = [*config.train_datasets, name]

    def get_optimizer_cls_and_kwargs(self, args: MTPConfig, model=None) -> tuple:
        if not self.uses_muon:
            return super().get_optimizer_cls_and_kwargs(args, model)
        settings = {"lr": args.learning_rate, "muon_lr": args.muon_learning_rate, "eps": args.adam_epsilon}
        settings |= {"betas": (args.adam_beta1, args.adam_beta2), "weight_decay": args.weight_decay}
        return make_muon_adamw, settings

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.deadline is None or self.lr_scheduler is not None:  # the user's own scheduler
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler = super().create_scheduler(SCHEDULE_STEPS, optimizer)
        self.deadline.follow_clock(scheduler)
        return scheduler

    def train(self, *args, **kwargs):
        refuse_different_processes(gather_object([{**self._adapter, **self._objective}]))
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            if not is_worker_death(error):
                raise
            newest = newest_complete_checkpoint(Path(self.args.output_dir))
            raise RuntimeError(worker_death_message(error, self.args.dataloader_num_workers, newest)) from error
        finally:  # callbacks do not learn of a failed training
            self.interrupt.restore_handler()

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The batches of one optimizer step, and the weight of all their masks, which divides their loss."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        k, decay, config = self.tuner.active_mtp_config.k, self.recipe.position_decay, self.model.config
        weights = [batch_weight(objective_inputs(batch, config), k, decay) for batch in batches]
        if not weights:
            return batches, None
        weight = torch.stack(weights).sum().to(device)
        if self._averages_over_processes:
            weight = self.accelerator.gather(weight).sum()
        return batches, weight.clamp(min=1e-6)  # not 0 if there are no targets

    @property
    def _averages_over_processes(self) -> bool:
        """Whether the loss is a mean over the masks of all processes together, not of each process separately."""
        return self.accelerator.num_processes > 1 and self.args.average_tokens_across_devices

    def checkpoint_facts(self) -> dict:
        """Facts about the adapter, the size of steps and the optimizer, for [`MTPTrainer.before_resuming`]."""
        sequences = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        steps = describe_steps(self.args.world_size, sequences)
        return {"adapter": self._adapter, "steps": steps, "muon": self.uses_muon}

    def weights_folder(self, checkpoint: Path) -> Path:
        """Where PEFT saves the active adapter. Sharded trainings load files of their own."""
        at_root = self.is_deepspeed_enabled or self.is_fsdp_enabled or self.tuner.active_adapters[0] == "default"
        return checkpoint if at_root else checkpoint / self.tuner.active_adapters[0]

    def before_resuming(self, checkpoint: Path) -> None:
        """Refuses a checkpoint of another adapter or optimizer, and warns of other step sizes."""
        there, here = contents(checkpoint), self.checkpoint_facts()
        refuse_incompatible_checkpoint(checkpoint.name, there.get("adapter", {}), here["adapter"])
        refuse_optimizer_change(checkpoint.name, there.get("muon"), here["muon"])
        if warning := step_size_warning(there.get("steps", {}), here["steps"]):
            logger.warning(warning)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = self.guard.check_gradients(model, super()._get_grad_norm(model, grad_norm))
        if self.guard.policy == "skip":
            self._metrics["train"]["skipped_steps"] = [self.guard.skipped_steps]
        return grad_norm

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = objective_inputs(inputs, self.model.config)
        refuse_ids(batch["input_ids"], self.tuner.active_mtp_config.base_vocab_size)
        try:
            objective: Objective = model(**batch, mtp_objective=self._request(batch, num_items_in_batch))
        except ValueError as error:
            if self.args.max_length is None or "image tokens do not match" not in str(error):
                raise
            raise ValueError(
                f"`max_length={self.args.max_length}` cuts off image tokens: {error}. Increase it, or set it to None."
            ) from error
        if self.model.training:
            objective = self.guard.check_losses(objective, batch["input_ids"])
        self._record(objective, batch)
        if not return_outputs:
            return objective.loss
        with torch.no_grad():  # as TRL does if the caller wants the logits
            return objective.loss, model(**{name: value for name, value in inputs.items() if name != "labels"})

    def _request(self, batch: dict, num_items_in_batch: torch.Tensor | None) -> ObjectiveRequest:
        args, anchors, generator, total = self.args, self.args.anchors_per_sequence, None, None
        if not self.model.training:
            generator = torch.Generator(batch["input_ids"].device).manual_seed(EVAL_SEED)
            takes_branches = speculation_mode(self.tuner.model) is SpeculationMode.TREE
            if takes_branches or args.eval_anchors_per_sequence is not None:
                anchors = args.eval_anchors_per_sequence
        elif num_items_in_batch is not None:  # DDP averages gradients over processes
            total = num_items_in_batch / (self.accelerator.num_processes if self._averages_over_processes else 1)
        return ObjectiveRequest(self.recipe, anchors, generator, total, args.masks_per_part)

    def _record(self, objective: Objective, batch: dict) -> None:
        """Stores the measures of a batch. [`~trl.SFTTrainer`]'s `log` averages them."""
        if not self.model.training:
            self.evaluated.add(objective)
            return
        metrics = self._metrics["train"]
        for name, value in measures_of(objective).items():
            metrics[name].append(value)
        mask = batch.get("attention_mask")
        tokens = torch.tensor(batch["input_ids"].numel()) if mask is None else mask.sum()
        self._total_train_tokens += int(self.accelerator.gather(tokens.to(self.accelerator.device)).sum())
        metrics["num_tokens"] = [self._total_train_tokens]

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self.evaluated = EvaluationMeasures()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        measured = {**self.evaluated.means(), "num_tokens": self._total_train_tokens}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, outputs.logits, inputs.get("labels")

    def _save_checkpoint(self, model, trial):
        with in_full_precision(self.tuner.active_mtp_config):  # whatever `save_dtype` says
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.accelerator.is_fsdp2:
            return super().save_model(output_dir, _internal_call)
        # For any state dict type: saves the full adapter in one file, without gathering the base.
        self._save(output_dir, state_dict=whole_adapter(self.model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """Writes the adapter's model card into `output_dir`. Takes the arguments of TRL's trainers."""
        if not self.is_world_process_zero():
            return
        if self.hub_model_id is not None:
            fetch_card_by_hand(self.hub_model_id, self.args.output_dir, self.args.hub_token, self.args.hub_revision)
        config, name = self.tuner.active_mtp_config, self.tuner.active_adapters[0]
        if dataset_name and dataset_name not in config.train_datasets:
            config.train_datasets = [*config.train_datasets, dataset_name]
        tags, subfolder = [tags] if isinstance(tags, str) else tags, None if name == "default" else name
        about = self.hub_model_id or model_name, tags, subfolder
        write_model_card(config, self.args.output_dir, *about, auto_class=auto_class(self.tuner.model))
