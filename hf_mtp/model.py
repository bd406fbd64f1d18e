"""The upgraded model: the tuner, plus `generate(mtp=True)` and the training objective."""

import torch

from .adapter.tuner import GatedLoraTuner
from .decoding.generate import GenerationMixin
from .objective.compute import batch_objective
from .objective.request import ObjectiveRequest


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
        return super().forward(input_ids, *args, **kwargs)
