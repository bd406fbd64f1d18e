"""Verify: which drafts are what the base model would have said, by the base model's own logits.

Knows logits, processors and stopping criteria as transformers defines them. Knows nothing of masks or caches.
"""

from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList


@dataclass
class Transcript:
    """A growing output, with what `generate` can be asked to return about it.

    Args:
        sequence (`torch.LongTensor` of shape `(1, S)`): Prompt and new tokens.
        scores, logits (`tuple` of `torch.Tensor` of shape `(1, V)`, or `None` if not asked for): One per new token,
            after and before the logits processors.
        stopped (`bool`): Whether a stopping criterion was met.
    """

    sequence: torch.LongTensor
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    stopped: bool = False


def verify_greedily(
    transcript: Transcript,
    draft_K: torch.LongTensor,
    logits_RV: torch.Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
) -> int:
    """Extends the transcript by the drafts that greedy decoding would have chosen, and one token more.

    Processors and criteria are called once per returned token, in order and with exactly the sequence that they get in
    plain decoding, so that even those with a state of their own behave the same.

    Args:
        transcript ([`Transcript`]): Extended in place.
        draft_K (`torch.LongTensor` of shape `(K,)`): Drafts for the next K tokens.
        logits_RV (`torch.Tensor` of shape `(K + 1, V)`): The base's logits before the first draft and after each.
        processors ([`~transformers.LogitsProcessorList`]): Applied to each row before the choice.
        criteria ([`~transformers.StoppingCriteriaList`]): Asked after each token.

    Returns:
        `int`: How many drafts were right and are now in the transcript.
    """
    drafts = draft_K.tolist()
    for accepted, logits_1V in enumerate(logits_RV.split(1)):
        logits_1V = logits_1V.to(dtype=torch.float32, copy=True)  # as plain decoding does; processors may write
        scores_1V = processors(transcript.sequence, logits_1V)
        token = scores_1V.argmax(dim=-1, keepdim=True)
        transcript.sequence = torch.cat([transcript.sequence, token], dim=1)
        if transcript.scores is not None:
            transcript.scores += (scores_1V,)
        if transcript.logits is not None:
            transcript.logits += (logits_1V,)
        transcript.stopped = bool(criteria(transcript.sequence, transcript.scores).all())
        is_draft = accepted < len(drafts) and token.item() == drafts[accepted]
        if transcript.stopped or not is_draft:
            return accepted + is_draft
    return len(drafts)
