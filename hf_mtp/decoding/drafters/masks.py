"""Drafts from masks: turns the hidden states of one block of masks per row into tokens.

Drafts need not be exact, because they are verified. So the unembedding is applied to all masks at once, and its most
likely tokens form a shortlist. The sampler head then chooses from it, one draft after the other.

Shapes: B batch, K drafts per row, C shortlisted tokens, D features, V vocabulary.
"""

import weakref
from collections.abc import Callable

import torch
from torch import nn
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ...adapter.sampler import SHORTLIST
from ...adapter.tuner import GatedLoraTuner
from ..outcome import Outcome
from ..sequence import Sequence
from .acceptance import MaskAcceptance
from .base import Drafts, no_drafts

# A mask does not know the tokens just before its own, so it is less certain than the base will be. A power of its
# distribution above 1 hits the base's choice more often; 1.25 is about as good (docs/benchmarks.md, "Sampled drafts").
SHARPNESS = 1.5
# Processors that also work on a shortlist. Others use token ids as indices.
SHORTLIST_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)


class MaskDrafter:
    """Drafts from the masks that follow each row's last accepted token.

    Args:
        tuner ([`GatedLoraTuner`]): The upgraded model.
        acceptance ([`MaskAcceptance`]): Acceptance rates.
        processors ([`~transformers.LogitsProcessorList`]): The processors of the call.
        siblings (`int`, *optional*, defaults to 0): How many further candidates to propose for each draft. If any, the
            drafter compares its proposals with the tokens that come, and updates the acceptance rates.
    """

    def __init__(
        self,
        tuner: GatedLoraTuner,
        acceptance: MaskAcceptance,
        processors: LogitsProcessorList,
        siblings: int = 0,
    ):
        self.tuner, self.acceptance, self.siblings = tuner, acceptance, siblings
        self.warpers = LogitsProcessorList(p for p in processors if type(p) in SHORTLIST_WARPERS)
        # The last proposals: each row's drafts, and the confidence and the siblings of each.
        self._proposed: weakref.WeakKeyDictionary[Sequence, tuple[list[int], list[float], list[list[int]]]] = (
            weakref.WeakKeyDictionary()
        )

    def observe(self, outcome: Outcome) -> None:
        """Compares the last proposals with the new tokens."""
        for sequence, tokens in zip(outcome.sequences, outcome.verified.tokens, strict=True):
            proposed = self._proposed.pop(sequence, None)
            if proposed is not None:
                self.acceptance.compare(*proposed, tokens)

    def expect(self, outcome: Outcome) -> list[list[float]]:
        """For each row, the probability that each possible draft is accepted if all before it are."""
        return [self.acceptance.rates[:masks] for masks in outcome.next_masks]

    def propose(self, outcome: Outcome, counts: list[int]) -> Drafts:
        """Makes `counts` drafts for each row from the masks that the pass computed."""
        # On the CPU, as on the device each of these small operations would start a kernel.
        rows, anchor_B = torch.arange(len(counts), device="cpu"), outcome.verified.anchor_B
        column_BK = outcome.plan.column_BRk[rows, anchor_B, : max(counts)]
        wanted_BK = torch.arange(column_BK.shape[1], device="cpu") < torch.tensor(counts, device="cpu")[:, None]
        output = outcome.output
        samples = any(row.noise is not None for row in outcome.sequences)
        noise_of = _noise_of(outcome.sequences) if samples else None
        drafts = self.tuner.draft(
            outcome.verified.pending_B,
            output.block(column_BK),
            noise_of,
            self.warpers,
            output.block_logits(column_BK),
            self.siblings,
        )
        drafts = drafts.where((column_BK >= 0) & wanted_BK.to(column_BK.device))
        if self.siblings:
            self._remember(outcome.sequences, drafts, counts)
        return drafts

    def _remember(self, sequences: list[Sequence], drafts: Drafts, counts: list[int]) -> None:
        for row, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            if count:
                of_row = drafts.tokens[row], drafts.confidences[row], drafts.siblings[row]
                self._proposed[sequence] = tuple(values[:count] for values in of_row)


def draft(
    tuner: GatedLoraTuner,
    pending_B: torch.LongTensor,
    hidden_BKD: torch.Tensor,
    noise_of: Callable[[int, torch.LongTensor], torch.Tensor] | None = None,
    warpers: LogitsProcessorList | None = None,
    logits_BKV: torch.Tensor | None = None,
    siblings: int = 0,
) -> Drafts:
    """Drafts a token for each mask of a block, given the token before it.

    Args:
        tuner ([`GatedLoraTuner`]): The upgraded model. Without a sampler head, each draft depends on its mask alone.
        pending_B (`torch.LongTensor` of shape `(B,)`): The token before the first draft.
        hidden_BKD (`torch.Tensor` of shape `(B, K, D)`): Last hidden states of the blocks' masks, in order.
        noise_of (`Callable`, *optional*): Maps a draft's number and its candidates `(B, C)` to noise `(B, C)` for
            sampling; greedy if `None`.
        warpers ([`~transformers.LogitsProcessorList`], *optional*): Processors to apply before the noise is added.
        logits_BKV (`torch.Tensor` of shape `(B, K, V)`, *optional*): The unembedding's logits of the states, if they
            are known.
        siblings (`int`, *optional*, defaults to 0): C, the number of further candidates for each draft.
    """
    if not hidden_BKD.shape[1]:
        return no_drafts(len(pending_B), pending_B.device)
    embedding, unembedding, sampler = tuner.model.get_input_embeddings(), tuner.unembedding(), tuner.sampler_head()
    logits_BKV = unembedding(hidden_BKD.contiguous()) if logits_BKV is None else logits_BKV
    score_BKC, candidate_BKC = logits_BKV.topk(min(SHORTLIST, logits_BKV.shape[-1]), dim=-1)
    if sampler is not None:
        refine, rescore = sampler.refiner(hidden_BKD), _shortlisted(unembedding, candidate_BKC)
    scores, ranked = [], []  # of each step: all candidates' scores, and the best candidates in order
    for step, candidate_BC in enumerate(candidate_BKC.unbind(dim=1)):
        score_BC = score_BKC[:, step].float() if sampler is None else rescore(step, refine(step, embedding(pending_B)))
        if noise_of is not None:
            score_BC = warpers(None, score_BC) + noise_of(step, candidate_BC) / SHARPNESS
        best_BW = score_BC.topk(min(1 + siblings, score_BC.shape[1]), dim=-1).indices
        scores.append(score_BC)
        ranked.append(candidate_BC.gather(1, best_BW))
        pending_B = ranked[-1][:, 0]
    ranked_BKW = torch.stack(ranked, dim=1)
    confidence_BK = torch.stack(scores, dim=1).softmax(dim=-1).amax(dim=-1)
    return Drafts(ranked_BKW[..., 0], confidence_BK, sibling_BKC=ranked_BKW[..., 1:] if siblings else None)


def _noise_of(sequences: list[Sequence]) -> Callable[[int, torch.LongTensor], torch.Tensor]:
    """A function that looks up the noise of candidates for each row's next tokens: 0 for rows that do not sample."""

    def noise_of(step: int, candidate_BC: torch.LongTensor) -> torch.Tensor:
        noise_BC = torch.zeros(candidate_BC.shape, device=candidate_BC.device)
        for index, row in enumerate(sequences):
            if row.noise is not None:
                noise_BC[index] = row.noise.at(row.new_tokens + step)[candidate_BC[index]]
        return noise_BC

    return noise_of


def _shortlisted(
    unembedding: nn.Module, candidate_BKC: torch.LongTensor
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """A function that scores a step's candidates, `(B, C)`, by features `(B, D)` and their rows of the unembedding."""
    weight_VD = getattr(unembedding, "weight", None)
    is_whole = type(weight_VD) in (torch.Tensor, nn.Parameter) and weight_VD.device == candidate_BKC.device
    if not (is_whole and weight_VD.dim() == 2 and weight_VD.is_floating_point()):
        # Rows of a quantized, distributed or offloaded layer cannot be selected.
        return lambda step, feature_BD: unembedding(feature_BD).float().gather(1, candidate_BKC[:, step])
    weight_KBCD = weight_VD[candidate_BKC].float().transpose(0, 1)  # a CPU multiplies few rows faster in float32
    bias_V = getattr(unembedding, "bias", None)
    bias_KBC = 0.0 if bias_V is None else bias_V[candidate_BKC].transpose(0, 1)

    def rescore(step: int, feature_BD: torch.Tensor) -> torch.Tensor:
        score_BC = (weight_KBCD[step] @ feature_BD.float()[:, :, None])[:, :, 0]
        return score_BC if bias_V is None else score_BC + bias_KBC[step].float()

    return rescore
