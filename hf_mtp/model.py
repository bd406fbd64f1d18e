"""The upgraded model: the tuner, plus `generate(mtp=True)` and the training objective."""

import torch

from .adapter.tuner import GatedLoraTuner
from .base.distributed import is_sharded
from .decoding.generate import GenerationMixin
from .layout.blocks import IGNORE, segments, training_layout, weight_of_all_masks
from .objective.compute import Objective, multi_token_objective
from .objective.recipe import Recipe
from .passes.speculation_mode import SpeculationMode, speculation_mode


class GatedLoraModel(GenerationMixin, GatedLoraTuner):
    """A causal language model that predicts several tokens at mask positions.

    [`~peft.get_peft_model`] makes it from a [`GatedLoraConfig`], and [`~peft.PeftModel.from_pretrained`] loads it. Do
    not construct it by hand. The base alone computes regular tokens. Mask tokens have the ids V..V+k-1, above the
    base's V ids, and stand after all regular tokens of an input.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base, frozen.
        peft_config ([`GatedLoraConfig`]): The adapter.
        adapter_name (`str`): Its name.

    Attributes:
        vocab_size (`int`): V, the number of ids in the base's vocabulary.
        active_mtp_config ([`GatedLoraConfig`]): Configuration of the active adapter.
        mtp_statistics ([`MTPStatistics`]): Counts of the latest `generate(mtp=True)`.
    """

    def forward(self, input_ids: torch.LongTensor | None = None, *args, mtp_recipe: Recipe | None = None, **kwargs):
        """The base's forward pass over regular tokens and masks; with a recipe, the training objective.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, N)`): Token ids.
            mtp_recipe ([`Recipe`], *optional*): If given, the result is an [`Objective`], and `kwargs` may have
                `labels`, `attention_mask` (2-D, of right-padded rows) and `position_ids`; `mtp_anchors` and
                `mtp_generator`, see [`training_layout`]; `mtp_total` and `mtp_masks_per_part`, see
                [`multi_token_objective`].
            args, kwargs: What the base's `forward` takes.
        """
        if mtp_recipe is not None:
            return self._objective(input_ids, mtp_recipe, **kwargs)
        return super().forward(input_ids, *args, **kwargs)

    @torch.compiler.disable(recursive=False)
    def _objective(
        self,
        input_ids: torch.LongTensor,
        recipe: Recipe,
        labels: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        mtp_anchors: int | None = None,
        mtp_generator: torch.Generator | None = None,
        mtp_total: torch.Tensor | None = None,
        mtp_masks_per_part: int = 1024,
        **_,  # PEFT adds arguments of its own that are None
    ) -> Objective:
        labels = input_ids if labels is None else labels
        places = _places(input_ids, attention_mask, position_ids)
        in_all_rows = speculation_mode(self.model) is not SpeculationMode.TREE
        k = self.active_mtp_config.k
        layout = training_layout(labels, *places, k, mtp_anchors, mtp_generator, same_in_all_rows=in_all_rows)
        if is_sharded(self) and not (layout.target_columns(labels) != IGNORE).any():
            # Nothing to learn from here, but other processes wait in every layer for this one.
            spare = self._objective(input_ids.new_zeros(1, 3), recipe)
            return Objective(spare.loss * 0.0, {}, 0)
        weight = weight_of_all_masks(labels, *places, k, recipe.position_decay)
        return multi_token_objective(
            self, input_ids, labels, layout, recipe, weight, mtp_total, masks_per_part=mtp_masks_per_part
        )

    def objective_weight(
        self,
        input_ids: torch.LongTensor,
        recipe: Recipe,
        labels: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """A scalar: what the loss of a batch is divided by. Sum it over batches whose gradients are added up."""
        labels = input_ids if labels is None else labels
        places = _places(input_ids, attention_mask, position_ids)
        return weight_of_all_masks(labels, *places, self.active_mtp_config.k, recipe.position_decay)


@torch.compiler.disable
def _places(
    input_ids_BT: torch.LongTensor, attention_mask_BT: torch.Tensor | None, position_ids_BT: torch.LongTensor | None
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Position and document, `(B, T)` each, of every token."""
    if position_ids_BT is None:
        position_ids_BT = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device).expand_as(input_ids_BT)
    return position_ids_BT, segments(attention_mask_BT, position_ids_BT)
