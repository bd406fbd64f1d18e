"""Drafts from masks: the hidden states of one block of masks per row become the tokens that they stand for.

Drafts need not be right, only likely, because verification decides. So all masks together read the unembedding once.
Its likeliest tokens are the shortlist among which the sampler head then chooses, one draft after the other.

Shapes: B batch, K drafts per row, C shortlisted tokens, D features, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ...adapter.tuner import GatedLoraTuner
from ..outcome import Outcome
from ..sequence import Sequence
from .acceptance import MaskAcceptance
from .base import Drafts, no_drafts

SHORTLIST = 32  # with masks trained, the right token is among the first ten (Samragh et al., arXiv 2507.11851, fig. 2)
# Processors that mean the same on a shortlist. Others know token ids, and a shortlist has none.
OF_SCORES_ALONE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)


class MaskDrafter:
    """Drafts from the masks that hang on each row's last token.

    Args:
        tuner ([`GatedLoraTuner`]): The upgraded model.
        acceptance ([`MaskAcceptance`]): Learns how often drafts are accepted.
        processors ([`~transformers.LogitsProcessorList`]): Of the call.
    """

    def __init__(self, tuner: GatedLoraTuner, acceptance: MaskAcceptance, processors: LogitsProcessorList):
        self.tuner, self.acceptance = tuner, acceptance
        self.warpers = LogitsProcessorList(p for p in processors if type(p) in OF_SCORES_ALONE)

    def observe(self, outcome: Outcome, is_own: list[bool]) -> None:
        """Learns from the rows whose drafts it made."""
        verified = outcome.verified
        self.acceptance.count(
            [
                (offered, accepted)
                for offered, accepted, own in zip(verified.offered, verified.accepted, is_own, strict=True)
                if own and offered
            ]
        )

    def expect(self, outcome: Outcome) -> list[list[float]]:
        """For each row, how likely each draft that it could make is to be accepted if all before it are."""
        return [self.acceptance.rates[:masks] for masks in outcome.next_masks]

    def propose(self, outcome: Outcome, counts: list[int]) -> Drafts:
        """Makes drafts.

        Args:
            outcome ([`Outcome`]): The pass that computed the masks.
            counts (`list[int]`): Drafts wanted for each row, at most as many as [`expect`] promised.
        """
        rows, accepted_B = torch.arange(len(counts)), outcome.verified.accepted_B
        column_BK = outcome.plan.column_BRk[rows, accepted_B, : max(counts)]
        wanted_BK = torch.arange(column_BK.shape[1]) < torch.tensor(counts)[:, None]
        output = outcome.output
        noise_of = None if outcome.sequences[0].noise is None else _noise_of(outcome.sequences)
        drafts = self.tuner.draft(
            outcome.verified.pending_B,
            output.block(column_BK),
            noise_of,
            self.warpers,
            output.block_logits(column_BK),
        )
        if noise_of is not None:  # how likely the noise made a draft says little about whether it is accepted
            rates_K = torch.tensor(self.acceptance.rates[: drafts.count], device=column_BK.device)
            drafts = Drafts(drafts.token_BK, rates_K.expand_as(drafts.confidence_BK))
        return drafts.where((column_BK >= 0) & wanted_BK.to(column_BK.device))


def draft(
    tuner: GatedLoraTuner,
    pending_B: torch.LongTensor,
    hidden_BKD: torch.Tensor,
    noise_of: Callable[[int, torch.LongTensor], torch.Tensor] | None = None,
    warpers: LogitsProcessorList | None = None,
    logits_BKV: torch.Tensor | None = None,
) -> Drafts:
    """A token for each mask of a block, each given the one before.

    Args:
        tuner ([`GatedLoraTuner`]): The upgraded model, with its sampler head if it has one. Without, each draft is
            what the unembedding makes of its mask alone.
        pending_B (`torch.LongTensor` of shape `(B,)`): The token before the first draft.
        hidden_BKD (`torch.Tensor` of shape `(B, K, D)`): Last hidden states of the blocks' masks, in order.
        noise_of (`Callable`, *optional*): Samples: the noise, `(B, C)`, of the K-th draft's candidates `(B, C)`.
        warpers ([`~transformers.LogitsProcessorList`], *optional*): Processors that look at the scores alone.
        logits_BKV (`torch.Tensor` of shape `(B, K, V)`, *optional*): What the unembedding makes of the states, if that
            is known.
    """
    if not hidden_BKD.shape[1]:
        return no_drafts(len(pending_B), pending_B.device)
    embedding, unembedding, sampler = tuner.model.get_input_embeddings(), tuner.unembedding(), tuner.sampler_head()
    logits_BKV = unembedding(hidden_BKD.contiguous()) if logits_BKV is None else logits_BKV
    score_BKC, candidate_BKC = logits_BKV.topk(min(SHORTLIST, logits_BKV.shape[-1]), dim=-1)
    if sampler is not None:
        refine, rescore = sampler.given(hidden_BKD), _shortlisted(unembedding, candidate_BKC)
    tokens, confidences = [], []
    for step, candidate_BC in enumerate(candidate_BKC.unbind(dim=1)):
        score_BC = score_BKC[:, step].float() if sampler is None else rescore(step, refine(step, embedding(pending_B)))
        if noise_of is not None:
            score_BC = warpers(None, score_BC) + noise_of(step, candidate_BC)
        best_B1 = score_BC.argmax(dim=-1, keepdim=True)
        confidences.append(score_BC.softmax(dim=-1).gather(1, best_B1))
        pending_B = candidate_BC.gather(1, best_B1)[:, 0]
        tokens.append(pending_B)
    return Drafts(torch.stack(tokens, dim=1), torch.cat(confidences, dim=1))


def _noise_of(sequences: list[Sequence]) -> Callable[[int, torch.LongTensor], torch.Tensor]:
    """The noise of the candidates for each row's next tokens."""

    def noise_of(step: int, candidate_BC: torch.LongTensor) -> torch.Tensor:
        noise_BV = torch.stack([row.noise.at(row.new_tokens + step) for row in sequences])
        return noise_BV.gather(1, candidate_BC)

    return noise_of


def _shortlisted(
    unembedding: nn.Module, candidate_BKC: torch.LongTensor
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Scores, `(B, C)`, of each step's candidates from features `(B, D)`, without reading the whole unembedding."""
    weight_VD = getattr(unembedding, "weight", None)
    is_whole = type(weight_VD) in (torch.Tensor, nn.Parameter) and weight_VD.device == candidate_BKC.device
    if not (is_whole and weight_VD.dim() == 2 and weight_VD.is_floating_point()):
        # A quantized, distributed or offloaded layer: its rows cannot be picked.
        return lambda step, feature_BD: unembedding(feature_BD).float().gather(1, candidate_BKC[:, step])
    weight_KBCD = weight_VD[candidate_BKC].transpose(0, 1)
    bias_V = getattr(unembedding, "bias", None)
    bias_KBC = 0.0 if bias_V is None else bias_V[candidate_BKC].transpose(0, 1)

    def rescore(step: int, feature_BD: torch.Tensor) -> torch.Tensor:
        score_BC = (weight_KBCD[step] @ feature_BD.to(weight_VD.dtype)[:, :, None])[:, :, 0]
        return (score_BC if bias_V is None else score_BC + bias_KBC[step]).float()

    return rescore
