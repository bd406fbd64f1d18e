"""Draft: from the hidden states of one block of masks per row to the tokens they stand for.

Drafts need not be right, only likely: verification decides. So the unembedding is read once, for all masks together,
and its likeliest tokens are the shortlist among which the sampler head then chooses, one draft after the other.

Shapes: B batch, K drafts per row, C shortlisted tokens, D features, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LogitsProcessorList

from ..adapter.sampler import SamplerHead

SHORTLIST = 32  # with masks trained, the right token is among the first ten (Samragh et al., arXiv 2507.11851, fig. 2)
NO_TOKEN = -1


@dataclass(frozen=True)
class Drafts:
    """Guesses at each row's next tokens.

    Args:
        token_BK (`torch.LongTensor` of shape `(B, K)`): The drafts, -1 where a row has no more.
        confidence_BK (`torch.Tensor` of shape `(B, K)`): The probability that drafting itself gives each draft.
        looked_up_B (`torch.BoolTensor` of shape `(B,)`): Rows whose drafts were found in their own text.
        candidate_BKC (`torch.LongTensor` of shape `(B, K, C)`), probability_BKC (`torch.Tensor` of the same shape):
            If drafts were drawn at random, the distributions that they were drawn from.
    """

    token_BK: torch.LongTensor
    confidence_BK: torch.Tensor
    looked_up_B: torch.BoolTensor
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

    def padded(self, count: int, candidates: int) -> "Drafts":
        """The same among K = `count` drafts and C = `candidates` candidates, with nothing in the new places."""
        short = count - self.count
        token_BK = F.pad(self.token_BK, (0, short), value=NO_TOKEN)
        confidence_BK = F.pad(self.confidence_BK, (0, short))
        if self.candidate_BKC is None:
            return Drafts(token_BK, confidence_BK, self.looked_up_B)
        pad = (0, candidates - self.candidate_BKC.shape[2], 0, short)
        spread = (F.pad(part, pad) for part in (self.candidate_BKC, self.probability_BKC))
        return Drafts(token_BK, confidence_BK, self.looked_up_B, *spread)

    def overridden_by(self, other: "Drafts") -> "Drafts":
        """Rows of `other` where it has drafts, own ones elsewhere."""
        sizes = [(d.count, 0 if d.candidate_BKC is None else d.candidate_BKC.shape[2]) for d in (self, other)]
        count, candidates = map(max, *sizes)
        mine, theirs = vars(self.padded(count, candidates)), vars(other.padded(count, candidates))
        chosen_B = other.token_BK[:, 0] != NO_TOKEN
        return Drafts(
            *(
                None if mine[name] is None else torch.where(_like(chosen_B, mine[name]), theirs[name], mine[name])
                for name in mine
            )
        )


def _like(row_B: torch.Tensor, tensor_Bx: torch.Tensor) -> torch.Tensor:
    """With as many dimensions as the tensor."""
    return row_B.view(-1, *[1] * (tensor_Bx.dim() - 1))


def no_drafts(batch: int, device: torch.device) -> Drafts:
    """No draft for any of `batch` rows."""
    none = torch.empty(batch, 0, device=device)
    return Drafts(none.long(), none, torch.zeros(batch, dtype=torch.bool, device=device))


def found_drafts(tokens: list[list[int]], confidences: list[list[float]], device: torch.device, drawn: bool) -> Drafts:
    """Drafts that were looked up: certain ones, as far as drafting is concerned.

    Args:
        tokens (`list[list[int]]`): Of each row; empty for rows without.
        confidences (`list[list[float]]`): The probability that each is accepted.
        device (`torch.device`): Where to put them.
        drawn (`bool`): Whether distributions are wanted: all of the probability is on the draft.
    """
    longest = max(map(len, tokens))
    token_BK = torch.tensor([row + [NO_TOKEN] * (longest - len(row)) for row in tokens], device=device)
    confidence_BK = torch.tensor([row + [0.0] * (longest - len(row)) for row in confidences], device=device)
    drafts = Drafts(token_BK, confidence_BK, token_BK[:, 0] != NO_TOKEN)
    if not drawn:
        return drafts
    candidate_BKC = token_BK.clamp(min=0)[:, :, None]
    return replace(
        drafts, candidate_BKC=candidate_BKC, probability_BKC=torch.ones_like(candidate_BKC, dtype=torch.float)
    )


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
    if sampler is not None:
        refine, rescore = sampler.given(hidden_BKD), _shortlisted(unembedding, candidate_BKC)
    choices, scores = [], []
    for step, candidate_BC in enumerate(candidate_BKC.unbind(dim=1)):
        score_BC = score_BKC[:, step] if sampler is None else rescore(step, refine(step, embedding(pending_B)))
        if draw is not None:
            score_BC = draw.warp(score_BC)
        choice_B1 = score_BC.argmax(-1, keepdim=True) if draw is None else draw.one_of(score_BC.softmax(dim=-1))
        pending_B = candidate_BC.gather(1, choice_B1)[:, 0]
        choices.append(choice_B1)
        scores.append(score_BC)
    probability_BKC = torch.stack(scores, dim=1).softmax(dim=-1)
    choice_BK1 = torch.stack(choices, dim=1)
    drafts = Drafts(
        candidate_BKC.gather(2, choice_BK1)[:, :, 0],
        probability_BKC.gather(2, choice_BK1)[:, :, 0],
        torch.zeros_like(pending_B, dtype=torch.bool),
    )
    return drafts if draw is None else replace(drafts, candidate_BKC=candidate_BKC, probability_BKC=probability_BKC)


def _shortlisted(
    unembedding: nn.Module, candidate_BKC: torch.LongTensor
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Scores, `(B, C)`, of each step's candidates from features `(B, D)`, without reading the whole unembedding."""
    weight_VD = getattr(unembedding, "weight", None)
    is_whole = type(weight_VD) in (torch.Tensor, nn.Parameter) and weight_VD.device == candidate_BKC.device
    if not (is_whole and weight_VD.dim() == 2 and weight_VD.is_floating_point()):
        # Quantized, spread over devices, or offloaded: its rows cannot be picked.
        return lambda step, feature_BD: unembedding(feature_BD).float().gather(1, candidate_BKC[:, step])
    weight_KBCD = weight_VD[candidate_BKC].transpose(0, 1)
    bias_V = getattr(unembedding, "bias", None)
    bias_KBC = 0.0 if bias_V is None else bias_V[candidate_BKC].transpose(0, 1)

    def rescore(step: int, feature_BD: torch.Tensor) -> torch.Tensor:
        score_BC = (weight_KBCD[step] @ feature_BD.to(weight_VD.dtype)[:, :, None])[:, :, 0]
        return (score_BC if bias_V is None else score_BC + bias_KBC[step]).float()

    return rescore


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
