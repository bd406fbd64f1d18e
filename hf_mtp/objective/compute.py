"""Computes the losses of one batch: layout, forward passes, targets, losses. Knows nothing of trainers or optimizers.

The loss is a mean over all masks that the batch could have. Sampled blocks give an unbiased estimate of it. So it does
not depend on how the batch is split into rows, micro-batches, processes or chunks.

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
from .simulation import SimulatedDecoding, mean_tokens_per_pass, simulate_decoding


@dataclass
class Objective(ModelOutput):
    """Results of one batch. A `ModelOutput`, in which wrappers of the model (DDP, FSDP, DeepSpeed) find the tensors.

    Args:
        loss (`torch.Tensor`): Weighted sum of the losses, a scalar with gradient. Zero if no mask had a target.
        metrics (`dict[str, torch.Tensor]`): Detached scalars: each loss, the accuracy of each mask position
            (`accuracy_1` ...) and `tokens_per_pass`, the mean over steps from random tokens. With `simulated`, this
            mean is `tokens_per_block`, and `tokens_per_pass` comes from the simulation. Empty if no mask had a target.
        rows (`int`): R, the number of supervised masks.
        simulated ([`SimulatedDecoding`], *optional*): Simulated decoding of the text, if gradients are off and every
            token has a block.
        weights (`dict[str, torch.Tensor]`, *optional*): How many masks or blocks each metric, and the loss, is a mean
            over, a scalar each. Weighted by these, the mean over several batches is that of one large batch.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] | None = None
    rows: int | None = None
    simulated: SimulatedDecoding | None = None
    weights: dict[str, torch.Tensor] | None = None


@dataclass
class _Chunk:
    """Results of one chunk of masks: the weighted sum of each loss, and which drafts would be accepted."""

    terms: dict[str, torch.Tensor]
    accepted_BM: torch.BoolTensor
    supervised_BM: torch.BoolTensor


@dataclass
class _Totals:
    """Results of all chunks, without gradients."""

    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    accepted: list[torch.BoolTensor] = field(default_factory=list)
    supervised: list[torch.BoolTensor] = field(default_factory=list)

    def add(self, chunk: _Chunk) -> None:
        for name, term in chunk.terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + term.detach()
        self.accepted.append(chunk.accepted_BM)
        self.supervised.append(chunk.supervised_BM)


# The number of supervised masks depends on the data. `torch_compile=True` compiles the forward passes, but not the few
# functions around them whose shapes depend on that number.
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
    """Adds blocks of masks to a batch and computes the losses.

    Args:
        model ([`GatedLoraTuner`]): The upgraded model.
        input_ids_BT (`torch.LongTensor` of shape `(B, T)`): Regular tokens.
        request ([`ObjectiveRequest`]): Settings of this step.
        labels (`torch.LongTensor` of shape `(B, T)`, *optional*): Aligned with the tokens, -100 outside the loss.
            `None`: all tokens are inside it.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding.
        position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): A new document begins where they restart.
        others: Other inputs of the base, such as images. `None` values are ignored.
    """
    labels = input_ids_BT if labels is None else labels
    position_BT, segment_BT = _positions_and_segments(input_ids_BT, attention_mask, position_ids)
    k, in_all_rows = model.active_mtp_config.k, speculation_mode(model.model) is not SpeculationMode.TREE
    layout = training_layout(labels, position_BT, segment_BT, k, request.anchors, request.generator, in_all_rows)
    if is_sharded(model) and not (layout.target_columns(labels) != IGNORE).any():
        # This batch has no targets, but other processes wait for this one in every layer.
        dummy = batch_objective(model, input_ids_BT.new_zeros(1, 3), ObjectiveRequest(request.recipe))
        return Objective(dummy.loss * 0.0, {}, 0)
    weight = weight_of_all_masks(labels, segment_BT, k, request.recipe.position_decay)
    if "token_type_ids" not in inspect.signature(model.model.forward).parameters:
        others.pop("token_type_ids", None)  # some tokenizers return them for every model
    if others := {name: value for name, value in others.items() if value is not None}:
        others |= {"attention_mask": attention_mask, "position_ids": position_ids}
    return multi_token_objective(model, input_ids_BT, labels, layout, request, weight, others)


def batch_weight(inputs: dict, k: int, decay: float) -> torch.Tensor:
    """A scalar, the divisor of a batch's loss. Sum it over batches whose gradients are accumulated.

    Args:
        inputs (`dict`): `input_ids` and `labels`, and optionally `attention_mask` and `position_ids`.
        k (`int`): Masks per block.
        decay (`float`): Weight of each mask of a block relative to the one before it.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    _, segment_BT = _positions_and_segments(inputs["input_ids"], mask, positions)
    return weight_of_all_masks(inputs["labels"], segment_BT, k, decay)


@torch.compiler.disable
def _positions_and_segments(
    input_ids_BT: torch.LongTensor, attention_mask_BT: torch.Tensor | None, position_ids_BT: torch.LongTensor | None
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Position and document of every token, `(B, T)` each."""
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
        layout ([`BlockLayout`]): The blocks and their anchors.
        request ([`ObjectiveRequest`]): Settings of this step.
        weight (`torch.Tensor`, a scalar): Weight of all possible masks, from
            [`~hf_mtp.layout.blocks.weight_of_all_masks`].
        base_inputs (`dict`, *optional*): Other inputs of the base's forward pass, for batches with more than text.
    """
    recipe = request.recipe
    rows = int((layout.target_columns(labels_BT) != IGNORE).sum())
    if not rows:
        return Objective(sum(p.sum() for p in model.trainable_parameters()) * 0.0, {}, 0)
    if model.sampler_head() is None:
        recipe = recipe.without_sampler()
    states = training_pass(model, input_ids_BT, layout, recipe.auxiliary > 0, request.masks_per_part, base_inputs)
    choice_BT = None
    if recipe.targets != "soft":  # soft targets contain the base's choice
        choice_BT = _base_choices(model.unembedding(), states.regular[-1], layout.target_columns(labels_BT))

    in_chunks = can_go_backward_in_chunks(model, states.chunks)
    backward = ChunkedBackward(model.trainable_parameters()) if in_chunks else None
    totals, loss, divisor = _Totals(), 0.0, weight if request.total is None else request.total
    for blocks in states.chunks:
        chunk = _compute_chunk(model, input_ids_BT, labels_BT, blocks, recipe, states, choice_BT)
        chunk_loss = sum(getattr(recipe, name) * term for name, term in chunk.terms.items()) / divisor
        loss = loss + (chunk_loss if backward is None else backward.accumulate(chunk_loss))
        totals.add(chunk)
    if backward is not None:
        loss = backward.with_gradients(loss)

    metrics = {f"loss_{name}": term / weight for name, term in totals.terms.items()}
    weights = dict.fromkeys(("loss", *metrics), weight)
    accepted_BM, supervised_BM = torch.cat(totals.accepted, dim=1), torch.cat(totals.supervised, dim=1)
    k = model.active_mtp_config.k
    quality, counts = _draft_quality(accepted_BM.view(-1, k), supervised_BM.view(-1, k))
    metrics, weights = metrics | quality, weights | counts
    if torch.is_grad_enabled() or layout.weight_B is not None:
        return Objective(loss, metrics, rows, weights=weights)
    simulated = simulate_decoding(layout.anchor_BM, accepted_BM, supervised_BM, k)
    for values in (metrics, weights):
        values["tokens_per_block"] = values["tokens_per_pass"]
    metrics["tokens_per_pass"] = torch.tensor(simulated.tokens_per_pass, device=accepted_BM.device)
    return Objective(loss, metrics, rows, simulated, weights)


def _compute_chunk(
    model: GatedLoraTuner,
    input_ids_BT: torch.LongTensor,
    labels_BT: torch.LongTensor,
    layout: BlockLayout,
    recipe: Recipe,
    states: TrainingPass,
    choice_BT: torch.LongTensor | None,
) -> _Chunk:
    """Forward pass and losses of some of the blocks. Arguments as in [`multi_token_objective`]."""
    target_column_BM = layout.target_columns(labels_BT)
    supervised_BM = target_column_BM != IGNORE
    row_R, mask_R = supervised_BM.nonzero(as_tuple=True)
    target_column_R = target_column_BM[row_R, mask_R]
    column_R = target_column_R - 1  # the token that the mask stands for

    masks_LBMD = states.masks(layout)
    regular_RD, mask_RD = states.regular[-1][row_R, column_R], masks_LBMD[-1][row_R, mask_R]
    choice_R = None if choice_BT is None else choice_BT[row_R, column_R]
    target_R = {"model": choice_R, "soft": regular_RD, "data": input_ids_BT[row_R, target_column_R]}[recipe.targets]

    losses, sampler, unembedding = {}, model.sampler_head(), model.unembedding()
    if recipe.base > 0 or sampler is None:  # saves a pass over the vocabulary if its weight is 0
        losses["base"], draft_R, top_R = cross_entropy(unembedding, mask_RD, target_R, recipe.divergence)
    if sampler is not None:
        drafted_BMD = drafted_features(model, input_ids_BT, layout, masks_LBMD[-1])
        losses["sampler"], draft_R, top_R = cross_entropy(
            unembedding, drafted_BMD[row_R, mask_R], target_R, recipe.divergence
        )
    losses["lcm"] = latent_consistency(mask_RD, regular_RD)
    if recipe.auxiliary > 0:
        losses["auxiliary"] = feature_consistency(
            torch.stack([at_least_float32(layer[row_R, mask_R]) for layer in masks_LBMD[1:-1]]),
            torch.stack([at_least_float32(layer[row_R, column_R]) for layer in states.regular[1:-1]]),
        )

    weight_R = recipe.position_decay ** (layout.step_BM[row_R, mask_R] - 1).to(losses["lcm"].dtype)
    if layout.weight_B is not None:
        weight_R = weight_R * layout.weight_B[row_R]
    accepted_BM = torch.zeros_like(supervised_BM)
    accepted_BM[row_R, mask_R] = draft_R == (top_R if choice_R is None else choice_R)
    return _Chunk({name: (loss_R * weight_R).sum() for name, loss_R in losses.items()}, accepted_BM, supervised_BM)


def drafted_features(
    model: GatedLoraTuner, input_ids_BT: torch.LongTensor, layout: BlockLayout, mask_BMD: torch.Tensor
) -> torch.Tensor:
    """`(B, M, D)`: the sampler head's features, teacher-forced: each sees the regular token that its mask stands for.

    Args:
        model ([`GatedLoraTuner`]): The upgraded model, with a sampler head.
        input_ids_BT (`torch.LongTensor` of shape `(B, T)`): Regular tokens.
        layout ([`BlockLayout`]): Complete blocks of k masks.
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
def _draft_quality(accepted_CK: torch.BoolTensor, supervised_CK: torch.BoolTensor) -> tuple[dict, dict]:
    """Accuracy of each mask position and mean tokens per pass, measured against the base's own choice; and how many
    masks or blocks each of them is a mean over."""
    count_K, used_C = supervised_CK.sum(dim=0), supervised_CK.any(dim=1)
    names = [f"accuracy_{step}" for step in range(1, len(count_K) + 1)]
    metrics = dict(zip(names, accepted_CK.sum(dim=0) / count_K.clamp(min=1), strict=True))
    metrics["tokens_per_pass"] = mean_tokens_per_pass(accepted_CK[used_C])
    return metrics, {**dict(zip(names, count_K, strict=True)), "tokens_per_pass": used_C.sum()}
