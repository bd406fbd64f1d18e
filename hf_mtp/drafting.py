"""Draft: from the hidden states of one block of masks per row to the tokens they stand for.

Drafts need not be right, only likely: verification decides. So the unembedding is read once, for all masks together,
and its likeliest tokens are the shortlist among which the sampler head then chooses, one draft after the other.

Shapes: B batch, K drafts per row, C shortlisted tokens, D features, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import LogitsProcessorList

from .sampler import SamplerHead

SHORTLIST = 32  # with masks trained, the right token is among the first ten (Samragh et al., arXiv 2507.11851, fig. 2)
NO_TOKEN = -1


@dataclass(frozen=True)
class Drafts:
    """Guesses at each row's next tokens.

    Args:
        token_BK (`torch.LongTensor` of shape `(B, K)`): The drafts, -1 where a row has no more.
        confidence_BK (`torch.Tensor` of shape `(B, K)`): The probability that drafting itself gives each draft.
        candidate_BKC (`torch.LongTensor` of shape `(B, K, C)`), probability_BKC (`torch.Tensor` of the same shape):
            If drafts were drawn at random, the distributions that they were drawn from.
    """

    token_BK: torch.LongTensor
    confidence_BK: torch.Tensor
    candidate_BKC: torch.LongTensor | None = None
    probability_BKC: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """K."""
        return self.token_BK.shape[1]

    def select_rows(self, index: list[int] | slice) -> "Drafts":
        """Some rows only."""
        return Drafts(*(None if part is None else part[index] for part in vars(self).values()))

    def where(self, wanted_BK: torch.BoolTensor) -> "Drafts":
        """Without the drafts that are not wanted."""
        return replace(self, token_BK=self.token_BK.where(wanted_BK, NO_TOKEN))


def no_drafts(batch: int, device: torch.device) -> Drafts:
    """No draft for any of `batch` rows."""
    return Drafts(torch.empty(batch, 0, dtype=torch.long, device=device), torch.empty(batch, 0, device=device))


def draft(
    pending_B: torch.LongTensor,
    hidden_BKD: torch.Tensor,
    embedding: nn.Module,
    unembedding: nn.Module,
    sampler: SamplerHead | None,
    draw: "Draw | None" = None,
) -> Drafts:
    """A token for each mask of a block, each given the one before.

    Args:
        pending_B (`torch.LongTensor` of shape `(B,)`): The token before the first draft.
        hidden_BKD (`torch.Tensor` of shape `(B, K, D)`): Last hidden states of the blocks' masks, in order.
        embedding, unembedding (`torch.nn.Module`): The base model's input and output layers.
        sampler ([`SamplerHead`], *optional*): Without it, each draft is what the unembedding makes of its mask alone.
        draw ([`Draw`], *optional*): Draws drafts at random; the likeliest are taken if `None`.
    """
    if not hidden_BKD.shape[1]:
        return no_drafts(len(pending_B), pending_B.device)
    score_BKV = unembedding(hidden_BKD).float()
    score_BKC, candidate_BKC = score_BKV.topk(min(SHORTLIST, score_BKV.shape[-1]), dim=-1)
    weight_VD = getattr(unembedding, "weight", None)
    can_gather = isinstance(weight_VD, torch.Tensor) and weight_VD.dim() == 2 and weight_VD.is_floating_point()
    tokens, confidences, probabilities = [], [], []
    for step, hidden_BD in enumerate(hidden_BKD.unbind(dim=1)):
        candidate_BC, score_BC = candidate_BKC[:, step], score_BKC[:, step]
        if sampler is not None:
            refined_BD = sampler(embedding(pending_B), hidden_BD)
            if can_gather:
                score_BC = (weight_VD[candidate_BC] @ refined_BD.to(weight_VD.dtype)[:, :, None])[:, :, 0].float()
                if getattr(unembedding, "bias", None) is not None:
                    score_BC = score_BC + unembedding.bias[candidate_BC]
            else:
                score_BC = unembedding(refined_BD).float().gather(1, candidate_BC)
        if draw is not None:
            score_BC = draw.warp(score_BC)
        probability_BC = score_BC.softmax(dim=-1)
        choice_B1 = probability_BC.argmax(dim=-1, keepdim=True) if draw is None else draw.one_of(probability_BC)
        pending_B = candidate_BC.gather(1, choice_B1)[:, 0]
        tokens.append(pending_B)
        confidences.append(probability_BC.gather(1, choice_B1)[:, 0])
        probabilities.append(probability_BC)
    drafts = Drafts(torch.stack(tokens, dim=1), torch.stack(confidences, dim=1))
    if draw is None:
        return drafts
    return Drafts(drafts.token_BK, drafts.confidence_BK, candidate_BKC, torch.stack(probabilities, dim=1))


@dataclass(frozen=True)
class Draw:
    """Chance, for drafts and for verification alike.

    Args:
        warpers ([`~transformers.LogitsProcessorList`]): Processors that look at the scores alone (temperature, top-k,
            top-p ...). Drafts that follow them are accepted more often.
        generator (`torch.Generator`, *optional*): Source of chance; torch's own if `None`.
    """

    warpers: LogitsProcessorList
    generator: torch.Generator | None = None

    def warp(self, score_XC: torch.Tensor) -> torch.Tensor:
        return self.warpers(None, score_XC)

    def one_of(self, probability_XC: torch.Tensor) -> torch.LongTensor:
        """`(X, 1)`: an index drawn from each row of probabilities, which need not sum to one."""
        return torch.multinomial(probability_XC, 1, generator=self.generator)

    def happens(self, probability_X: torch.Tensor) -> torch.BoolTensor:
        """`(X,)`: True with the given probabilities."""
        return torch.rand(probability_X.shape, generator=self.generator, device=probability_X.device) < probability_X
