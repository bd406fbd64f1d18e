"""Decodes recorded texts again without their model: the loop, the drafters and the schedule are the real ones.

A record has a text that the base wrote, and what the adapter would draft at each of its tokens. So a schedule can be
tried with any costs of passes, in seconds, and nothing else that runs on the machine matters.

Shapes: B = 1 batch, K masks of a block, C candidates of a mask, V tokens that occur in the record.
"""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from hf_mtp.cache.rollback import RollbackCache
from hf_mtp.decoding.batch import Batch
from hf_mtp.decoding.drafters.base import Drafts
from hf_mtp.decoding.drafters.masks import MaskDrafter
from hf_mtp.decoding.drafters.ngrams import NgramDrafter
from hf_mtp.decoding.loop import DecodingLoop
from hf_mtp.decoding.schedule.adaptive import AdaptiveSchedule
from hf_mtp.decoding.schedule.costs import PassCosts
from hf_mtp.decoding.sequence import Sequence
from hf_mtp.decoding.verifier import Verifier
from hf_mtp.passes.decoding_pass import PassOutput


@dataclass(frozen=True)
class Text:
    """A text, and the candidates of a block of masks on each of its tokens.

    Args:
        ids (`list[int]`): Prompt and answer.
        prompt (`int`): Tokens of the prompt.
        candidates (`dict[int, list[list[int]]]`): By place of the block's anchor: for each mask its candidates,
            likeliest first. Each mask is told the first candidate of the one before it.
    """

    ids: list[int]
    prompt: int
    candidates: dict[int, list[list[int]]]

    @property
    def vocab(self) -> dict[int, int]:
        """A number for each token that occurs."""
        every = {*self.ids, *(token for block in self.candidates.values() for mask in block for token in mask)}
        return {token: number for number, token in enumerate(sorted(every))}


class RecordedModel:
    """Stands in for the forward pass and for the adapter's drafting. The state of a mask is its anchor and its step.

    Args:
        text ([`Text`]): What it knows.
    """

    def __init__(self, text: Text):
        self.text, self.tuner = text, self
        self.number = text.vocab
        self.ids_S = torch.tensor([self.number[token] for token in text.ids])

    def positions_left(self, used: int) -> int:
        return 2**31

    def __call__(self, regular_BT, layout, cache, logits_rows: int) -> PassOutput:
        next_BR = (layout.position_BT[:, -logits_rows:] + 1).clamp(max=len(self.ids_S) - 1)
        logits_BRV = torch.nn.functional.one_hot(self.ids_S[next_BR], len(self.number)).float()
        anchor_BM = layout.position_BT.gather(1, layout.anchor_BM)
        state_BMD = torch.stack([anchor_BM, layout.step_BM], dim=2).float()
        return PassOutput(logits_BRV, state_BMD, regular_BT.shape[1] - logits_rows, cache.rows.lengths)

    def draft(self, pending_B, hidden_BKD, noise_of=None, warpers=None, logits_BKV=None, siblings: int = 0) -> Drafts:
        count = hidden_BKD.shape[1]
        block = self.text.candidates.get(int(hidden_BKD[0, 0, 0]), [[self.text.ids[0]] * 4] * count)
        candidate_KC = torch.tensor([[self.number[token] for token in mask] for mask in block[:count]])
        return Drafts(
            candidate_KC[None, :, 0],
            torch.ones(1, count),
            sibling_BKC=candidate_KC[None, :, 1 : 1 + siblings] if siblings else None,
        )


@dataclass
class Replayed:
    """Sums over texts, in units of a plain pass over one token."""

    tokens: int = 0
    passes: int = 0
    cost: float = 0.0
    columns: int = 0
    with_masks: int = 0
    alternatives: int = 0

    @property
    def speedup(self) -> float:
        """Over plain decoding."""
        return self.tokens / self.cost


def replay(texts: list[Text], costs: PassCosts, k: int, masks: bool = True, ngrams: bool = True, siblings: int = 2):
    """Decodes texts one after the other by the adaptive schedule, which learns from text to text.

    Args:
        texts (`list[Text]`): The texts.
        costs ([`PassCosts`]): What passes cost.
        k (`int`): Masks per block; the sampler drafts from all of them.
        masks, ngrams (`bool`), siblings (`int`): Which drafts to use.
    """
    schedule, total = AdaptiveSchedule(k), Replayed()
    schedule.costs = costs
    if not masks:
        schedule.masks, schedule.trial, schedule.resting = 0, 0, 2**31
        schedule.MARGIN = float("inf")
    for text in texts:
        model = RecordedModel(text)
        drafters = [MaskDrafter(model, schedule.mask_acceptance, LogitsProcessorList(), siblings)]
        drafters += [NgramDrafter(schedule.ngram_rates)] if ngrams else []
        length = len(text.ids)
        verifier = Verifier(LogitsProcessorList(), StoppingCriteriaList([MaxLengthCriteria(length)]), rows=1)
        loop = DecodingLoop(model, schedule, drafters, verifier, k)
        prompt_S = model.ids_S[: text.prompt]
        row = Sequence(prompt_S, 0, 0, length - text.prompt, GenerationConfig(), LogitsProcessorList())
        batch = Batch([row], RollbackCache(torch.zeros(1, dtype=torch.long)), prompt_S[None])
        first = True
        while not batch.is_done:
            is_tree = batch.drafts.parent_BK is not None
            outcome = loop.step(batch)
            columns = outcome.columns - (text.prompt - 1 if first else 0)
            total.tokens += outcome.verified.new_tokens[0]
            total.passes += 1
            total.cost += costs.of(columns, outcome.plan.masks > 0)
            total.columns += columns
            total.with_masks += outcome.plan.masks > 0
            total.alternatives += is_tree
            first = False
        assert row.text == model.ids_S.tolist()
    return total
