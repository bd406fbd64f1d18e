"""[`MTPTrainer`]: TRL's supervised fine-tuning with the multi-token objective."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.utils import logging
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..adapter.base_identity import record_tokenizer
from ..adapter.card import write_model_card
from ..adapter.config import in_full_precision
from ..base.distributed import whole_adapter
from ..base.inspection import unpack_for_gradients
from ..model import GatedLoraModel
from ..objective.compute import Objective, batch_weight
from ..objective.request import ObjectiveRequest
from ..passes.speculation_mode import SpeculationMode, speculation_mode
from .batches import objective_inputs
from .callbacks.attach import watch
from .callbacks.deadline import TICKS, Deadline
from .callbacks.interrupt import SaveOnInterrupt
from .config import MTPConfig
from .data_checks import (
    gated,
    refuse_datasets,
    refuse_model,
    refuse_nothing_to_learn,
    refuse_parameters,
    refuse_settings,
)
from .evaluation import EvaluationMeasures, measures_of
from .optimizer import make_muon_adamw, refuse_another_optimizer, takes_muon
from .recovery.checkpoint import WholeCheckpoints, contents, newest_whole_checkpoint
from .recovery.compatibility import (
    describe,
    describe_objective,
    describe_steps,
    refuse_disagreement,
    refuse_to_resume,
    what_changes,
)
from .recovery.nonfinite import NonfiniteGuard
from .recovery.workers import died, explain_death

logger = logging.get_logger(__name__)

EVAL_SEED = 0  # evaluation draws the same anchors every time


class MTPTrainer(WholeCheckpoints, SFTTrainer):
    """
    Trains the adapter of an upgraded model.

    A [`~trl.SFTTrainer`] in all but its loss: every dataset format that TRL takes goes in unchanged, and saving,
    resuming, evaluation and reporting are those of [`~transformers.Trainer`]. Checkpoints hold the adapter, not the
    base; each is there whole or not at all, also if the process is killed while it saves. Logs each loss (`loss_base`,
    `loss_sampler`, `loss_lcm`, `loss_auxiliary`), the accuracy of each mask position against the base's own choice
    (`accuracy_1` ... `accuracy_k`) and `tokens_per_step`; with the prefix `eval_` in evaluation, where
    `eval_tokens_per_step` is what quadratic decoding would give if it wrote the same text. In training it is what a
    step from a sampled token would give, which is more, since decoding comes by easy stretches in fewer steps than by
    hard ones; evaluation has that as `eval_tokens_per_block`.

    Args:
        model ([`~peft.PeftModel`]):
            The model to train, from `get_peft_model(base, GatedLoraConfig(...))`; or a base model (or its name),
            together with `peft_config=GatedLoraConfig(...)`.
        args ([`MTPConfig`], *optional*):
            Configuration of the training. [`~transformers.TrainingArguments`] and [`~trl.SFTConfig`] are taken, too,
            see [`MTPConfig.from_arguments`].
        kwargs:
            Everything else that [`~trl.SFTTrainer`] takes, except `compute_loss_func`. `compute_metrics` gets the
            logits of regular tokens, which are the base's own.

    Raises:
        TypeError: `args` are those of a trainer of another kind.
        ValueError: The model was not upgraded, its adapter is not trainable or its base is, the dataset is empty,
            mixes formats or has nothing to learn from, `max_length` leaves no room for a block, the base cannot tell
            packed texts apart, or `compute_loss_func` is given. From `train`: the checkpoint is of another adapter or
            base, or processes train different ones.
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
            raise ValueError("`compute_loss_func` would replace the multi-token objective: leave it out.")
        if isinstance(train_dataset, Dataset) and len(train_dataset) == 0:
            raise ValueError("`train_dataset` is empty: multi-token prediction needs at least one text to learn from.")
        args = MTPConfig(output_dir="mtp_output") if args is None else MTPConfig.from_arguments(args)
        refuse_datasets(args, train_dataset, **kwargs)
        refuse_model(args, model, kwargs.get("peft_config"))
        self.deadline = Deadline(args.max_minutes) if args.max_minutes is not None else None
        with _router_untouched(model):
            super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self.has_muon = takes_muon(self)
        tuner = gated(self.model)
        unpack_for_gradients(self.model)
        refuse_parameters(tuner)  # as TRL left them
        refuse_settings(args, tuner)
        self.recipe = args.resolved_recipe()
        if isinstance(self.data_collator, DataCollatorForLanguageModeling):  # else labels are the collator's to make
            refuse_nothing_to_learn(self.train_dataset, args.max_length)
        self._describe_training(tuner)
        # The loss is divided by the weight of all masks of the accumulated batches, see `get_batch_samples`.
        self.model_accepts_loss_kwargs = True
        self.evaluated = EvaluationMeasures()
        # Taken before the model is sharded or wrapped.
        self._adapter, self._objective = describe(tuner), describe_objective(self.recipe, args.anchors_per_sequence)
        self.guard = NonfiniteGuard(self, args.nonfinite)
        self.interrupt = SaveOnInterrupt()
        self.add_callback(self.interrupt)
        if self.deadline is not None:
            self.add_callback(self.deadline)
        watch(self, curves=args.training_curves)

    def _describe_training(self, tuner: GatedLoraModel) -> None:
        """Records in the adapter's config what its card and a later load need to know."""
        config = tuner.active_mtp_config
        record_tokenizer(config, self._tokenizer, tuner.model)
        config.base_vocab_size = tuner.vocab_size  # which may have grown since the upgrade
        config.recipe = self.args.recipe
        name = getattr(getattr(self.train_dataset, "info", None), "dataset_name", None)
        if name and name not in config.train_datasets:
            config.train_datasets = [*config.train_datasets, name]

    def get_optimizer_cls_and_kwargs(self, args: MTPConfig, model=None) -> tuple:
        if not self.has_muon:
            return super().get_optimizer_cls_and_kwargs(args, model)
        settings = {"lr": args.learning_rate, "muon_lr": args.muon_learning_rate, "eps": args.adam_epsilon}
        settings |= {"betas": (args.adam_beta1, args.adam_beta2), "weight_decay": args.weight_decay}
        return make_muon_adamw, settings

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.deadline is None or self.lr_scheduler is not None:  # the user's own has its own length
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler = super().create_scheduler(TICKS, optimizer)
        self.deadline.drive(scheduler)
        return scheduler

    def train(self, *args, **kwargs):
        refuse_disagreement(gather_object([{**self._adapter, **self._objective}]))
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            if not died(error):
                raise
            newest = newest_whole_checkpoint(Path(self.args.output_dir))
            raise RuntimeError(explain_death(error, self.args.dataloader_num_workers, newest)) from error
        finally:  # also when training failed, and no callback hears of its end
            self.interrupt.restore_handler()

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The batches of one optimizer step, and the weight of all their masks, on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        k = gated(self.accelerator.unwrap_model(self.model)).active_mtp_config.k
        inputs = [objective_inputs(batch, self.model.config) for batch in batches]
        weights = [batch_weight(batch, k, self.recipe.position_decay) for batch in inputs]
        if not weights:
            return batches, None
        weight = torch.stack(weights).sum().to(device)
        if self._counts_everywhere:
            weight = self.accelerator.gather(weight).sum()
        return batches, weight.clamp(min=1e-6)  # batches without a target

    @property
    def _counts_everywhere(self) -> bool:
        """Whether the loss is a mean over the masks of all processes, and not of each by itself."""
        return self.accelerator.num_processes > 1 and self.args.average_tokens_across_devices

    def checkpoint_facts(self) -> dict:
        """The adapter, how steps are spread and who takes them, for [`MTPTrainer.before_resuming`]."""
        args = self.args
        sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = describe_steps(args.world_size, sequences)
        return {"adapter": self._adapter, "steps": steps, "muon": self.has_muon}

    def before_resuming(self, checkpoint: Path) -> None:
        """Refuses a checkpoint of another adapter or optimizer, and says what another spread of steps changes."""
        there, here = contents(checkpoint), self.checkpoint_facts()
        refuse_to_resume(checkpoint.name, there.get("adapter", {}), here["adapter"])
        refuse_another_optimizer(checkpoint.name, there.get("muon"), here["muon"])
        if change := what_changes(there.get("steps", {}), here["steps"]):
            logger.warning(change)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = self.guard.norm(model, super()._get_grad_norm(model, grad_norm))
        if self.guard.policy == "skip":
            self._metrics["train"]["skipped_steps"] = [self.guard.skipped_steps]
        return grad_norm

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = objective_inputs(inputs, self.model.config)
        try:
            objective: Objective = model(**batch, mtp_objective=self._request(batch, num_items_in_batch))
        except ValueError as error:
            if self.args.max_length is None or "image tokens do not match" not in str(error):
                raise
            raise ValueError(
                f"`max_length={self.args.max_length}` cuts off places of an image: {error}. Make it longer, or None."
            ) from error
        if self.model.training:
            objective = self.guard(objective, batch["input_ids"])
        self._record(objective, batch)
        if not return_outputs:
            return objective.loss
        with torch.no_grad():  # as TRL does where somebody wants the logits
            return objective.loss, model(**{name: value for name, value in inputs.items() if name != "labels"})

    def _request(self, batch: dict, num_items_in_batch: torch.Tensor | None) -> ObjectiveRequest:
        args, anchors, generator, total = self.args, self.args.anchors_per_sequence, None, None
        if not self.model.training:
            generator = torch.Generator(batch["input_ids"].device).manual_seed(EVAL_SEED)
            tuner = gated(self.accelerator.unwrap_model(self.model))
            if args.eval_anchors_per_sequence is not None or speculation_mode(tuner.model) is SpeculationMode.TREE:
                anchors = args.eval_anchors_per_sequence
        elif num_items_in_batch is not None:  # of processes whose gradients are averaged
            total = num_items_in_batch / (self.accelerator.num_processes if self._counts_everywhere else 1)
        return ObjectiveRequest(self.recipe, anchors, generator, total, args.masks_per_part)

    def _record(self, objective: Objective, batch: dict) -> None:
        """Averages over the steps between two logs are made by [`~trl.SFTTrainer`]'s `log`."""
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
        with in_full_precision(gated(self.model).active_mtp_config):  # whatever an adapter is saved in at the end
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.accelerator.is_fsdp2:
            return super().save_model(output_dir, _internal_call)
        # Whatever the type of state dict: the adapter whole, in one file, and none of the base gathered for it.
        self._save(output_dir, state_dict=whole_adapter(self.model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """Writes the adapter's own model card into `output_dir`. Arguments are those of TRL's trainers."""
        if not self.is_world_process_zero():
            return
        tuner = gated(self.model)
        config, name = tuner.active_mtp_config, tuner.active_adapters[0]
        if dataset_name and dataset_name not in config.train_datasets:
            config.train_datasets = [*config.train_datasets, dataset_name]
        write_model_card(
            config,
            self.args.output_dir,
            repo=self.hub_model_id or model_name,
            tags=[tags] if isinstance(tags, str) else tags,
            subfolder=None if name == "default" else name,
        )


@contextmanager
def _router_untouched(model) -> Iterator[None]:
    """Within, TRL switches the losses of experts off in the base's own config; afterwards it is the user's again."""
    config = None if isinstance(model, str) else model.config.get_text_config()
    names = [name for name in ("output_router_logits", "router_aux_loss_coef") if hasattr(config, name)]
    before = [getattr(config, name) for name in names]
    yield
    for name, value in zip(names, before, strict=True):
        setattr(config, name, value)
