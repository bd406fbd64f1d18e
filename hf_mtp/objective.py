"""One training step of the method: a batch of text in, the four losses out.

    layout -> forward pass -> targets -> losses

Shapes: B batch, T regular tokens, A anchors, k masks per block, M = A * k, N = T + M, R supervised masks, D features.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.utils import ModelOutput

from .layout import IGNORE, BlockLayout
from .losses import (
    cross_entropy,
    feature_consistency,
    latent_consistency,
    likeliest_tokens,
    simulated_tokens_per_step,
)
from .recipe import Recipe

if TYPE_CHECKING:
    from .tuner import GatedLoraModel


@dataclass
class Objective(ModelOutput):
    """What one batch gave, in a form in which wrappers of the model (DDP, FSDP, DeepSpeed) find the tensors.

    Args:
        loss (`torch.Tensor`): Weighted sum of the losses, a scalar with gradient. Zero if no mask had a target.
        metrics (`dict[str, torch.Tensor]`): Each loss by itself, accuracy per mask position (`accuracy_1` ...) and
            `tokens_per_step`, detached scalars. Empty if no mask had a target.
        rows (`int`): R, supervised masks.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] | None = None
    rows: int | None = None


# How many masks are supervised depends on the data. With `torch_compile=True` the forward passes are compiled, and the
# few functions around them that have such shapes are left as they are.
@torch.compiler.disable(recursive=False)
def multi_token_objective(
    model: "GatedLoraModel",
    input_ids_BT: torch.LongTensor,
    labels_BT: torch.LongTensor,
    layout: BlockLayout,
    recipe: Recipe,
) -> Objective:
    """Runs the masked forward pass and computes the losses.

    Args:
        model ([`GatedLoraModel`]): The upgraded model.
        input_ids_BT (`torch.LongTensor` of shape `(B, T)`): Regular tokens.
        labels_BT (`torch.LongTensor` of shape `(B, T)`): Labels aligned with the tokens, -100 outside the loss.
        layout ([`BlockLayout`]): Where the blocks hang.
        recipe ([`Recipe`]): Weights and targets.
    """
    target_column_BM = layout.target_columns(labels_BT)
    row_R, mask_R = (target_column_BM != IGNORE).nonzero(as_tuple=True)
    if not len(row_R):
        return Objective(sum(p.sum() for p in model.head_parameters()) * 0.0, {}, 0)
    target_column_R = target_column_BM[row_R, mask_R]
    column_R = target_column_R - 1  # the token that the mask stands for
    step_R = layout.step_BM[row_R, mask_R]

    regular_LBTD, masks_LBMD = model.masked_states(input_ids_BT, layout, all_layers=recipe.auxiliary > 0)
    regular_RD, mask_RD = regular_LBTD[-1][row_R, column_R], masks_LBMD[-1][row_R, mask_R]

    unembedding = model.unembedding()
    base_choice_R = _base_choices(unembedding, regular_LBTD[-1], row_R, column_R)
    target_R = {
        "model": base_choice_R,
        "soft": regular_RD,
        "data": input_ids_BT[row_R, target_column_R],
    }[recipe.targets]

    losses, sampler = {}, model.sampler_head()
    if recipe.base > 0 or sampler is None:  # else a pass over the vocabulary is saved
        losses["base"], draft_R = cross_entropy(unembedding, mask_RD, target_R)
    if sampler is not None:
        previous_RE = model.model.get_input_embeddings()(input_ids_BT[row_R, column_R])
        losses["sampler"], draft_R = cross_entropy(unembedding, sampler(previous_RE, mask_RD), target_R)
    losses["lcm"] = latent_consistency(mask_RD, regular_RD)
    if recipe.auxiliary > 0:
        losses["auxiliary"] = feature_consistency(
            torch.stack([states[row_R, mask_R] for states in masks_LBMD[1:-1]]),
            torch.stack([states[row_R, column_R] for states in regular_LBTD[1:-1]]),
        )

    weight_R = recipe.position_decay ** (step_R - 1).float()
    weight_R = weight_R / weight_R.sum()
    terms = {name: (loss_R * weight_R).sum() for name, loss_R in losses.items()}
    loss = sum(getattr(recipe, name) * term for name, term in terms.items())
    metrics = {f"loss_{name}": term.detach() for name, term in terms.items()}
    metrics |= _draft_quality(draft_R == base_choice_R, row_R, mask_R, layout, model.active_mtp_config.k)
    return Objective(loss, metrics, len(row_R))


@torch.compiler.disable
def _base_choices(
    unembedding: torch.nn.Module, hidden_BTD: torch.Tensor, row_R: torch.LongTensor, column_R: torch.LongTensor
) -> torch.LongTensor:
    """`(R,)`: the base's likeliest next token after each of R regular tokens, many of which are the same one."""
    choice_BT = torch.zeros(hidden_BTD.shape[:2], dtype=torch.long, device=hidden_BTD.device)
    needed_BT = torch.zeros_like(choice_BT, dtype=torch.bool)
    needed_BT[row_R, column_R] = True
    choice_BT[needed_BT] = likeliest_tokens(unembedding, hidden_BTD[needed_BT])
    return choice_BT[row_R, column_R]


@torch.compiler.disable
def _draft_quality(
    accepted_R: torch.BoolTensor, row_R: torch.LongTensor, mask_R: torch.LongTensor, layout: BlockLayout, k: int
) -> dict[str, torch.Tensor]:
    """Accuracy per mask position and simulated tokens per step, against the base's own choice."""
    accepted_BM = torch.zeros_like(layout.anchor_BM, dtype=torch.bool)
    supervised_BM = torch.zeros_like(accepted_BM)
    accepted_BM[row_R, mask_R] = accepted_R
    supervised_BM[row_R, mask_R] = True
    accepted_CK, supervised_CK = accepted_BM.view(-1, k), supervised_BM.view(-1, k)
    used_C = supervised_CK.any(dim=1)
    accuracy_K = accepted_CK.sum(dim=0) / supervised_CK.sum(dim=0).clamp(min=1)
    metrics = {f"accuracy_{step}": accuracy for step, accuracy in enumerate(accuracy_K, start=1)}
    metrics["tokens_per_step"] = simulated_tokens_per_step(accepted_CK[used_C])
    return metrics
