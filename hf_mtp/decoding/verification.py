"""Verify: which drafts are what the base model would have said, by the base model's own logits.

Greedy decoding accepts a draft that is the likeliest token. Sampling accepts a draft x with probability
min(1, p(x) / q(x)) and otherwise draws from what p has more than q, so that tokens come out as if drawn from p
(Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). p is the base's distribution after all logits
processors, q the one that drafts were drawn from.

Knows logits, processors and stopping criteria as transformers defines them. Knows nothing of masks or caches.

Shapes: B batch, K drafts, R = K + 1 positions, C shortlisted tokens, V vocabulary, X positions of whatever order.
"""

import pickle
from copy import copy

import torch
import torch.nn.functional as F
from transformers import (
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import logits_process

from .drafting import NO_TOKEN, Drafts, Draw
from .transcript import Transcript

# Processors that look at the scores alone and never at the tokens before them.
WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper) + tuple(
    getattr(logits_process, name)
    for name in (
        "MinPLogitsWarper",
        "TopHLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "LogitNormalization",
        "InfNanRemoveLogitsProcessor",
        "SuppressTokensLogitsProcessor",
    )
    if hasattr(logits_process, name)
)

# transformers' own that remember earlier calls.
KEEPS_STATE = {"SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor"}
# Attributes of transformers' own with an entry for each row of the batch.
PER_ROW = {"prompt_ignore_length", "encoder_input_ids", "generated_ngrams"}


def accepted_drafts(
    score_XV: torch.Tensor,
    token_X: torch.LongTensor,
    draw: Draw | None = None,
    candidate_XC: torch.LongTensor | None = None,
    probability_XC: torch.Tensor | None = None,
) -> torch.BoolTensor:
    """`(X,)`: whether each draft, taken by itself, is accepted.

    Args:
        score_XV (`torch.Tensor` of shape `(X, V)`): The base's scores, after the processors.
        token_X (`torch.LongTensor` of shape `(X,)`): Drafts, -1 where there is none.
        draw ([`Draw`], *optional*): Samples; greedy if `None`.
        candidate_XC, probability_XC (*optional*): With `draw`, the distributions that the drafts were drawn from.
    """
    if draw is None:
        return score_XV.argmax(dim=-1) == token_X
    log_p_X = score_XV.gather(1, token_X.clamp(min=0)[:, None])[:, 0] - score_XV.logsumexp(dim=-1)
    q_X = (probability_XC * (candidate_XC == token_X[:, None])).sum(dim=-1)
    return draw.happens((log_p_X.exp() / q_X).where(q_X > 0, 0.0))


def next_token(
    score_XV: torch.Tensor,
    draw: Draw | None = None,
    rejected_X: torch.LongTensor | None = None,
    candidate_XC: torch.LongTensor | None = None,
    probability_XC: torch.Tensor | None = None,
) -> torch.LongTensor:
    """`(X,)`: the base's own token, where its draft was rejected or there is none.

    Args:
        score_XV (`torch.Tensor` of shape `(X, V)`): The base's scores, after the processors.
        draw ([`Draw`], *optional*): Samples; greedy if `None`.
        rejected_X (`torch.LongTensor` of shape `(X,)`, *optional*): The rejected drafts, -1 where there was none.
        candidate_XC, probability_XC (*optional*): The distributions that these were drawn from.
    """
    if draw is None:
        return score_XV.argmax(dim=-1)
    p_XV = score_XV.softmax(dim=-1)
    if candidate_XC is not None:
        q_XC = probability_XC * (rejected_X != NO_TOKEN)[:, None]
        surplus_XV = p_XV.scatter_add(1, candidate_XC, -q_XC).clamp(min=0)
        # No surplus at all means p = q up to rounding; then no draft is rejected but by rounding.
        p_XV = torch.where(surplus_XV.sum(dim=-1, keepdim=True) > 0, surplus_XV, p_XV)
    return draw.one_of(p_XV)[:, 0]


def verify_together(
    logits_BRV: torch.Tensor, drafts: Drafts, draw: Draw | None, warpers: LogitsProcessorList
) -> tuple[torch.LongTensor, torch.LongTensor, torch.Tensor]:
    """All positions of all rows at once, for processors that look at the scores alone.

    Args:
        logits_BRV (`torch.Tensor` of shape `(B, K + 1, V)`): The base's logits before the first draft and after each.
        drafts ([`Drafts`]): K per row.
        draw ([`Draw`], *optional*): Samples; greedy if `None`.
        warpers ([`~transformers.LogitsProcessorList`]): The processors.

    Returns:
        `(B, R)` tokens, of which a row's first `accepted + 1` hold; `(B,)` accepted drafts; `(B, R, V)` scores.
    """
    batch, positions, vocab = logits_BRV.shape
    logits_XV = logits_BRV.reshape(-1, vocab).to(torch.float32, copy=len(warpers) > 0)
    score_BRV = (warpers(None, logits_XV) if warpers else logits_XV).view(batch, positions, vocab)
    token_BR = F.pad(drafts.token_BK, (0, 1), value=NO_TOKEN)
    accepted_B = torch.zeros_like(token_BR[:, 0])
    row_B, spread = torch.arange(batch, device=accepted_B.device), ()
    if drafts.count:
        if draw is not None:
            spread = drafts.candidate_BKC, drafts.probability_BKC
        per_draft = (part.flatten(0, 1) for part in (score_BRV[:, :-1], drafts.token_BK))
        accepted_X = accepted_drafts(*per_draft, draw, *(part.flatten(0, 1) for part in spread))
        accepted_B = accepted_X.view(batch, drafts.count).long().cumprod(dim=1).sum(dim=1)
        # Behind the last draft none is rejected: its distribution is not looked at.
        spread = [part[row_B, accepted_B.clamp(max=drafts.count - 1)] for part in spread]
    # One choice per row: the distributions behind a rejected draft are of no use.
    next_B = next_token(score_BRV[row_B, accepted_B], draw, token_BR[row_B, accepted_B], *spread)
    return token_BR.scatter(1, accepted_B[:, None], next_B[:, None]), accepted_B, score_BRV


def verify_in_order(
    transcript: Transcript,
    row: int,
    logits_RV: torch.Tensor,
    drafts: Drafts,
    draw: Draw | None,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
) -> int:
    """Extends one row of the transcript by the drafts that hold, and by one token more.

    Processors and criteria are called once per returned token, in order and with exactly the sequence that they get in
    plain decoding, so that even those with a state of their own behave the same.

    Args:
        transcript ([`Transcript`]): Its row is extended in place.
        row (`int`): Which one.
        logits_RV (`torch.Tensor` of shape `(K + 1, V)`): The base's logits before the first draft and after each.
        drafts ([`Drafts`]): Of this row alone, B = 1.
        draw ([`Draw`], *optional*): Samples; greedy if `None`.
        processors ([`~transformers.LogitsProcessorList`]): Applied to each row before the choice.
        criteria ([`~transformers.StoppingCriteriaList`]): Asked after each token.

    Returns:
        `int`: How many drafts were accepted.
    """
    for position, logits_1V in enumerate(logits_RV.split(1)):
        logits_1V = logits_1V.to(dtype=torch.float32, copy=True)  # as plain decoding does; processors may write
        score_1V = processors(transcript.prefix(row), logits_1V)
        here, spread = slice(position, position + 1), ()
        draft_1, accepted = torch.full((1,), NO_TOKEN, device=logits_RV.device), False
        if position < drafts.count:
            draft_1 = drafts.token_BK[0, here]
            if draw is not None:
                spread = drafts.candidate_BKC[0, here], drafts.probability_BKC[0, here]
            accepted = bool(accepted_drafts(score_1V, draft_1, draw, *spread))
        token_1 = draft_1 if accepted else next_token(score_1V, draw, draft_1, *spread)
        transcript.append(row, token_1, logits_1V, score_1V)
        stopped = bool(criteria(transcript.prefix(row), transcript.scores_of(row)).all())
        if stopped:
            transcript.finish(row)
        if stopped or not accepted:
            return position + accepted
    return drafts.count


def processors_of_row(processors: LogitsProcessorList, row: int, rows: int) -> LogitsProcessorList:
    """The processors as one row of a batch sees them, when rows go on at different speeds.

    Args:
        processors ([`~transformers.LogitsProcessorList`]): As prepared for the whole batch.
        row (`int`): Number of the row.
        rows (`int`): B.
    """
    if rows == 1:
        return processors
    return LogitsProcessorList(_of_row(processor, row) for processor in processors)


def _of_row(processor, row: int):
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, prefix: allowed(row, prefix), 1)
    if type(processor).__module__ != logits_process.__name__:
        return _Stateless(processor)
    if type(processor).__name__ in KEEPS_STATE:
        raise ValueError(
            f"{type(processor).__name__} keeps a state over all rows of a batch, which accept different numbers of "
            "drafts per pass. Pass one sequence at a time (batch size 1 is exact), or drop `mtp=True`."
        )
    own = copy(processor)
    for name in PER_ROW & vars(own).keys():
        value = getattr(own, name)
        setattr(own, name, value[row : row + 1] if isinstance(value, torch.Tensor | list) else value)
    if "batch_size" in vars(own):
        own.batch_size = 1
    return own


class _Stateless:
    """A custom processor that is called for one row at a time, which must not notice."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        before = self._state()
        scores = self.processor(input_ids, scores)
        if self._state() != before:
            raise ValueError(
                f"The logits processor {type(self.processor).__name__} keeps a state of its own. In a batch, rows "
                "accept different numbers of drafts per pass, so it would not be called as in plain decoding. Pass "
                "one sequence at a time (batch size 1 is exact with such processors), or drop `mtp=True`."
            )
        return scores

    def _state(self) -> bytes:
        try:
            return pickle.dumps(self.processor)
        except Exception as error:  # pickling raises whatever the object's parts raise
            raise ValueError(
                f"Cannot tell whether the logits processor {type(self.processor).__name__} keeps a state of its own "
                f"({error}), which a batch with `mtp=True` does not allow. Pass one sequence at a time, or make it a "
                "class at the top level of a module."
            ) from error
