"""One training step of the method: a batch of text in, the four losses out.

    layout -> forward passes -> targets -> losses

The loss is a mean over all masks that there could be in the batch, of which sampled blocks give an estimate without
bias. So it does not depend on how the batch is cut up: into rows, micro-batches, processes or parts.

Shapes: B batch, T regular tokens, M masks per row, k masks per block, C blocks, R supervised masks, D, E features.
"""

import inspect
from dataclasses import dataclass, field

import torch
from transformers.utils import ModelOutput

from ..adapter.tuner import GatedLoraTuner
from ..base.distributed import is_sharded
from ..layout.blocks import IGNORE, BlockLayout, segments, training_layout, weight_of_all_masks
from ..passes.speculation_mode import SpeculationMode, speculation_mode
from ..passes.training_pass import TrainingPass, training_pass
from .chunked_backward import ChunkedBackward, can_go_backward_in_chunks
from .losses import at_least_float32, cross_entropy, feature_consistency, latent_consistency, likeliest_tokens
from .recipe import Recipe
from .request import ObjectiveRequest
from .simulation import SimulatedDecoding, mean_tokens_per_step, simulate_decoding


@dataclass
class Objective(ModelOutput):
    """What one batch gave, in a form in which wrappers of the model (DDP, FSDP, DeepSpeed) find the tensors.

    Args:
        loss (`torch.Tensor`): Weighted sum of the losses, a scalar with gradient. Zero if no mask had a target.
        metrics (`dict[str, torch.Tensor]`): Each loss by itself, accuracy per mask position (`accuracy_1` ...) and
            `tokens_per_step`, detached scalars. That is what a step from a token taken at random returns; where
            `simulated` is given, it is that of the whole text, and `tokens_per_block` is the other. Empty if no mask
            had a target.
        rows (`int`): R, supervised masks.
        simulated ([`SimulatedDecoding`], *optional*): What decoding this very text would take: without gradients, and
            if there was a block on every token.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] | None = None
    rows: int | None = None
    simulated: SimulatedDecoding | None = None


@dataclass
class _Part:
    """What one part of the masks gave: weighted sums of each loss, and which drafts would be accepted."""

    terms: dict[str, torch.Tensor]
    accepted_BM: torch.BoolTensor
    supervised_BM: torch.BoolTensor


@dataclass
class _Whole:
    """The parts together, without gradients."""

    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    accepted: list[torch.BoolTensor] = field(default_factory=list)
    supervised: list[torch.BoolTensor] = field(default_factory=list)

    def add(self, part: _Part) -> None:
        for name, term in part.terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + term.detach()
        self.accepted.append(part.accepted_BM)
        self.supervised.append(part.supervised_BM)


# How many masks are supervised depends on the data. With `torch_compile=True` the forward passes are compiled, and the
# few functions around them that have such shapes are left as they are.
@torch.compiler.disable(recursive=False)
def batch_objective(
    model: GatedLoraTuner,
    input_ids_BT: torch.LongTensor,
    request: ObjectiveRequest,
    labels: torch.LongTensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    **others,
) -> Objective:
    """Hangs blocks of masks on a batch and computes the losses.

    Args:
        model ([`GatedLoraTuner`]): The upgraded model.
        input_ids_BT (`torch.LongTensor` of shape `(B, T)`): Regular tokens.
        request ([`ObjectiveRequest`]): What is asked for.
        labels (`torch.LongTensor` of shape `(B, T)`, *optional*): Aligned with the tokens, -100 outside the loss. All
            tokens if `None`.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding.
        position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): A document begins wherever they begin anew.
        others: What else the base is given with these tokens, such as images; `None` is nothing.
    """
    labels = input_ids_BT if labels is None else labels
    position_BT, segment_BT = _places(input_ids_BT, attention_mask, position_ids)
    k, in_all_rows = model.active_mtp_config.k, speculation_mode(model.model) is not SpeculationMode.TREE
    layout = training_layout(labels, position_BT, segment_BT, k, request.anchors, request.generator, in_all_rows)
    if is_sharded(model) and not (layout.target_columns(labels) != IGNORE).any():
        # Nothing to learn from here, but other processes wait in every layer for this one.
        spare = batch_objective(model, input_ids_BT.new_zeros(1, 3), ObjectiveRequest(request.recipe))
        return Objective(spare.loss * 0.0, {}, 0)
    weight = weight_of_all_masks(labels, segment_BT, k, request.recipe.position_decay)
    if "token_type_ids" not in inspect.signature(model.model.forward).parameters:
        others.pop("token_type_ids", None)  # of a tokenizer that gives them to every model
    if others := {name: value for name, value in others.items() if value is not None}:
        others |= {"attention_mask": attention_mask, "position_ids": position_ids}
    return multi_token_objective(model, input_ids_BT, labels, layout, request, weight, others)


def batch_weight(inputs: dict, k: int, decay: float) -> torch.Tensor:
    """A scalar: what the loss of a batch is divided by. Sum it over batches whose gradients are added up.

    Args:
        inputs (`dict`): `input_ids`, `labels` and, as [`batch_objective`] takes them, attention mask and position ids.
        k (`int`): Masks per block.
        decay (`float`): Weight of each mask of a block relative to the one before it.
    """
    _, segment_BT = _places(inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids"))
    return weight_of_all_masks(inputs["labels"], segment_BT, k, decay)


@torch.compiler.disable
def _places(
    input_ids_BT: torch.LongTensor, attention_mask_BT: torch.Tensor | None, position_ids_BT: torch.LongTensor | None
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Position and document, `(B, T)` each, of every token."""
    if position_ids_BT is None:
        position_ids_BT = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device).expand_as(input_ids_BT)
    return position_ids_BT, segments(attention_mask_BT, position_ids_BT)


@torch.compiler.disable(recursive=False)
def multi_token_objective(
    model: GatedLoraTuner,
    input_ids_BT: torch.LongTensor,
    labels_BT: torch.LongTensor,
    layout: BlockLayout,
    request: ObjectiveRequest,
    weight: torch.Tensor,
    base_inputs: dict | None = None,
) -> Objective:
    """Runs the masked forward passes and computes the losses.

    Args:
        model ([`GatedLoraTuner`]): The upgraded model.
        input_ids_BT (`torch.LongTensor` of shape `(B, T)`): Regular tokens.
        labels_BT (`torch.LongTensor` of shape `(B, T)`): Labels aligned with the tokens, -100 outside the loss.
        layout ([`BlockLayout`]): Where the blocks hang.
        request ([`ObjectiveRequest`]): What is asked for.
        weight (`torch.Tensor`, a scalar): Of all masks that there could be, see
            [`~hf_mtp.layout.blocks.weight_of_all_masks`].
        base_inputs (`dict`, *optional*): What else the base's forward pass is given, if it is more than text.
    """
    recipe = request.recipe
    rows = int((layout.target_columns(labels_BT) != IGNORE).sum())
    if not rows:
        return Objective(sum(p.sum() for p in model.trainable_parameters()) * 0.0, {}, 0)
    if model.sampler_head() is None:
        recipe = recipe.without_sampler()
    masks_per_part = request.masks_per_part
    reading = training_pass(model, input_ids_BT, layout, recipe.auxiliary > 0, masks_per_part, base_inputs)
    choice_BT = None
    if recipe.targets != "soft":  # else targets tell
        choice_BT = _base_choices(model.unembedding(), reading.regular[-1], layout.target_columns(labels_BT))

    backward = (
        ChunkedBackward(model.trainable_parameters()) if can_go_backward_in_chunks(model, reading.parts) else None
    )
    whole, loss, total = _Whole(), 0.0, weight if request.total is None else request.total
    for blocks in reading.parts:
        part = _part(model, input_ids_BT, labels_BT, blocks, recipe, reading, choice_BT)
        part_loss = sum(getattr(recipe, name) * term for name, term in part.terms.items()) / total
        loss = loss + (part_loss if backward is None else backward.through(part_loss))
        whole.add(part)
    if backward is not None:
        loss = backward.deliver(loss)

    metrics = {f"loss_{name}": term / weight for name, term in whole.terms.items()}
    accepted_BM, supervised_BM = torch.cat(whole.accepted, dim=1), torch.cat(whole.supervised, dim=1)
    k = model.active_mtp_config.k
    metrics |= _draft_quality(accepted_BM.view(-1, k), supervised_BM.view(-1, k))
    if torch.is_grad_enabled() or layout.weight_B is not None:
        return Objective(loss, metrics, rows)
    simulated = simulate_decoding(layout.anchor_BM, accepted_BM, supervised_BM, k)
    metrics["tokens_per_block"] = metrics["tokens_per_step"]
    metrics["tokens_per_step"] = torch.tensor(simulated.tokens_per_step, device=accepted_BM.device)
    return Objective(loss, metrics, rows, simulated)


def _part(
    model: GatedLoraTuner,
    input_ids_BT: torch.LongTensor,
    labels_BT: torch.LongTensor,
    layout: BlockLayout,
    recipe: Recipe,
    reading: TrainingPass,
    choice_BT: torch.LongTensor | None,
) -> _Part:
    """Forward pass and losses of some of the blocks. Arguments as in [`multi_token_objective`], and what was read."""
    target_column_BM = layout.target_columns(labels_BT)
    supervised_BM = target_column_BM != IGNORE
    row_R, mask_R = supervised_BM.nonzero(as_tuple=True)
    target_column_R = target_column_BM[row_R, mask_R]
    column_R = target_column_R - 1  # the token that the mask stands for

    masks_LBMD = reading.masks(layout)
    regular_RD, mask_RD = reading.regular[-1][row_R, column_R], masks_LBMD[-1][row_R, mask_R]
    choice_R = None if choice_BT is None else choice_BT[row_R, column_R]
    target_R = {"model": choice_R, "soft": regular_RD, "data": input_ids_BT[row_R, target_column_R]}[recipe.targets]

    losses, sampler, unembedding = {}, model.sampler_head(), model.unembedding()
    if recipe.base > 0 or sampler is None:  # else a pass over the vocabulary is saved
        losses["base"], draft_R, top_R = cross_entropy(unembedding, mask_RD, target_R, recipe.divergence)
    if sampler is not None:
        drafted_BMD = drafted_features(model, input_ids_BT, layout, masks_LBMD[-1])
        losses["sampler"], draft_R, top_R = cross_entropy(
            unembedding, drafted_BMD[row_R, mask_R], target_R, recipe.divergence
        )
    losses["lcm"] = latent_consistency(mask_RD, regular_RD)
    if recipe.auxiliary > 0:
        losses["auxiliary"] = feature_consistency(
            torch.stack([at_least_float32(states[row_R, mask_R]) for states in masks_LBMD[1:-1]]),
            torch.stack([at_least_float32(states[row_R, column_R]) for states in reading.regular[1:-1]]),
        )

    weight_R = recipe.position_decay ** (layout.step_BM[row_R, mask_R] - 1).to(losses["lcm"].dtype)
    if layout.weight_B is not None:
        weight_R = weight_R * layout.weight_B[row_R]
    accepted_BM = torch.zeros_like(supervised_BM)
    accepted_BM[row_R, mask_R] = draft_R == (top_R if choice_R is None else choice_R)
    return _Part({name: (loss_R * weight_R).sum() for name, loss_R in losses.items()}, accepted_BM, supervised_BM)


def drafted_features(
    model: GatedLoraTuner, input_ids_BT: torch.LongTensor, layout: BlockLayout, mask_BMD: torch.Tensor
) -> torch.Tensor:
    """`(B, M, D)`: features of the sampler head, each given the token of the text that its mask stands for.

    Args:
        model ([`GatedLoraTuner`]): The upgraded model, with a sampler head.
        input_ids_BT (`torch.LongTensor` of shape `(B, T)`): Regular tokens.
        layout ([`BlockLayout`]): Whole blocks of k masks.
        mask_BMD (`torch.Tensor` of shape `(B, M, D)`): Last hidden states of the masks.
    """
    stands_for_BM = layout.stands_for_BM.clamp(max=input_ids_BT.shape[1] - 1)
    previous_BME = model.model.get_input_embeddings()(input_ids_BT.gather(1, stands_for_BM))
    k = model.active_mtp_config.k
    blocks = model.sampler_head()(*(states.reshape(-1, k, states.shape[-1]) for states in (previous_BME, mask_BMD)))
    return blocks.view(mask_BMD.shape)


@torch.compiler.disable
def _base_choices(
    unembedding: torch.nn.Module, hidden_BTD: torch.Tensor, target_column_BM: torch.LongTensor
) -> torch.LongTensor:
    """`(B, T)`: the base's likeliest next token after each regular token that some mask stands for."""
    row_R, mask_R = (target_column_BM != IGNORE).nonzero(as_tuple=True)
    needed_BT = torch.zeros(hidden_BTD.shape[:2], dtype=torch.bool, device=hidden_BTD.device)
    needed_BT[row_R, target_column_BM[row_R, mask_R] - 1] = True
    choice_BT = torch.zeros_like(needed_BT, dtype=torch.long)
    choice_BT[needed_BT] = likeliest_tokens(unembedding, hidden_BTD[needed_BT])
    return choice_BT


@torch.compiler.disable
def _draft_quality(accepted_CK: torch.BoolTensor, supervised_CK: torch.BoolTensor) -> dict[str, torch.Tensor]:
    """Accuracy per mask position and simulated tokens per step, against the base's own choice."""
    accuracy_K = accepted_CK.sum(dim=0) / supervised_CK.sum(dim=0).clamp(min=1)
    metrics = {f"accuracy_{step}": accuracy for step, accuracy in enumerate(accuracy_K, start=1)}
    metrics["tokens_per_step"] = mean_tokens_per_step(accepted_CK[supervised_CK.any(dim=1)])
    return metrics
