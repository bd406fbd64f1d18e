"""The upgraded model: the tuner, plus `generate(mtp=True)` and the training objective."""

import torch
from transformers.utils import logging

from .adapter.tuner import GatedLoraTuner
from .decoding.generate import GenerationMixin
from .objective.compute import batch_objective
from .objective.request import ObjectiveRequest

logger = logging.get_logger(__name__)


class GatedLoraModel(GenerationMixin, GatedLoraTuner):
    """A causal language model that predicts several tokens at mask positions.

    Create it with [`~peft.get_peft_model`] and a [`GatedLoraConfig`], or load it with
    [`~peft.PeftModel.from_pretrained`]; do not construct it by hand. Regular tokens are computed by the base alone.
    Mask tokens have the ids V..V+k-1, above the base's V ids, and follow all regular tokens of an input.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base, frozen.
        peft_config ([`GatedLoraConfig`]): The adapter's configuration.
        adapter_name (`str`): The adapter's name.

    Attributes:
        vocab_size (`int`): V, the number of ids in the base's vocabulary.
        active_mtp_config ([`GatedLoraConfig`]): Configuration of the active adapter.
        mtp_statistics ([`MTPStatistics`]): Counts of the latest `generate(mtp=True)`.
    """

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        *args,
        mtp_objective: ObjectiveRequest | None = None,
        **kwargs,
    ):
        """Runs the base's forward pass over regular tokens and masks, or computes the training objective.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, N)`): Token ids.
            mtp_objective ([`ObjectiveRequest`], *optional*): If given, the method returns an [`Objective`], and
                `kwargs` are those of [`~hf_mtp.objective.compute.batch_objective`].
            args, kwargs: Further arguments of the base's `forward`.
        """
        if mtp_objective is not None:
            return batch_objective(self, input_ids, mtp_objective, **kwargs)
        if self.model.training and torch.is_grad_enabled():
            self._warn_of_training_nothing(input_ids)
        return super().forward(input_ids, *args, **kwargs)

    def _warn_of_training_nothing(self, input_ids: torch.LongTensor | None) -> None:
        """Warns once of a training by other means than [`MTPTrainer`], which would go on without an error."""
        if input_ids is not None and bool((input_ids >= self.vocab_size).any()):
            return
        parameters = self.model.named_parameters()
        if any(p.requires_grad and (self.is_stacked or "lora_" not in name) for name, p in parameters):
            return  # the base is trained, or an adapter of its own
        logger.warning_once(
            "This forward pass of a training has no masks, so the adapter gets no gradients and learns nothing. Train "
            "it with `hf_mtp.MTPTrainer`. To train the base instead, pass the base to the trainer, and attach the "
            "adapter to the base with `hf_mtp.attached.attach(base, adapter)`."
        )
