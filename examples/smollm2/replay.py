"""Decodes recorded texts again without their model: the loop, the drafters and the schedule are the real ones.

A record has a text that the base wrote, and what the adapter would draft at each of its tokens. So a schedule can be
tried with any costs of passes, in seconds, and nothing else that runs on the machine matters.

Shapes: B = 1 batch, K masks of a block, C candidates of a mask, V tokens that occur in the record.
"""

from dataclasses import dataclass, replace

import torch
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from hf_mtp.cache.rollback import RollbackCache
from hf_mtp.decoding.batch import Batch
from hf_mtp.decoding.drafters.acceptance import count_matching
from hf_mtp.decoding.drafters.base import Drafts
from hf_mtp.decoding.drafters.lookup import MOST_DRAFTS as MOST
from hf_mtp.decoding.drafters.masks import MaskDrafter
from hf_mtp.decoding.drafters.ngrams import NgramDrafter, NgramIndex
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
        confidences (`dict[int, list[float]]`): By the same places: the adapter's confidence in each first candidate.
    """

    ids: list[int]
    prompt: int
    candidates: dict[int, list[list[int]]]
    confidences: dict[int, list[float]]

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

    bitwise, switches, scaled_columns = False, (), None

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
        anchor = int(hidden_BKD[0, 0, 0])
        block = self.text.candidates.get(anchor, [[self.text.ids[0]] * 4] * count)
        confidence_K = torch.tensor(self.text.confidences.get(anchor, [0.0] * count)[:count])
        candidate_KC = torch.tensor([[self.number[token] for token in mask] for mask in block[:count]])
        return Drafts(
            candidate_KC[None, :, 0],
            confidence_K[None],
            sibling_BKC=candidate_KC[None, :, 1 : 1 + siblings] if siblings else None,
        )


@dataclass
class Replayed:
    """Sums over texts.

    Args:
        tokens, passes, columns (`int`): New tokens, passes and their columns.
        with_masks, trees (`int`): Passes with masks, and passes that verified a tree.
        cost (`float`): In units of a plain pass over one token.
    """

    tokens: int = 0
    passes: int = 0
    columns: int = 0
    with_masks: int = 0
    trees: int = 0
    cost: float = 0.0


class WithoutMasks(AdaptiveSchedule):
    """The adaptive schedule that takes no masks, not even on trial."""

    def __init__(self, k: int):
        super().__init__(k)
        self.masks = 0

    def _takes_masks(self, gain: float) -> bool:
        return False


class WithoutSiblings(AdaptiveSchedule):
    """The adaptive schedule that takes no siblings."""

    def _candidates(self, row, expected, proposals):
        chains = [None if drafts is None else replace(drafts, sibling_BKC=None) for drafts in proposals]
        return super()._candidates(row, expected, chains)


def replay(
    texts: list[Text], costs: PassCosts, k: int, masks: bool = True, ngrams: bool = True, siblings: int = 2
) -> Replayed:
    """Decodes texts one after the other by the adaptive schedule, which learns from text to text.

    Args:
        texts (`list[Text]`): The texts.
        costs ([`PassCosts`]): What passes cost.
        k (`int`): Masks per block.
        masks, ngrams (`bool`), siblings (`int`): Which drafts to use.
    """
    kind = AdaptiveSchedule if masks and siblings else WithoutSiblings if masks else WithoutMasks
    schedule, total = kind(k), Replayed()
    schedule.costs = costs
    for text in texts:
        model, length = RecordedModel(text), len(text.ids)
        drafters = [MaskDrafter(model, schedule.mask_acceptance, LogitsProcessorList(), max(1, siblings))]
        drafters += [NgramDrafter(schedule.ngram_rates)] if ngrams else []
        verifier = Verifier(LogitsProcessorList(), StoppingCriteriaList([MaxLengthCriteria(length)]), rows=1)
        loop = DecodingLoop(model, schedule, drafters, verifier, k)
        prompt_S = model.ids_S[: text.prompt]
        row = Sequence(prompt_S, 0, 0, length - text.prompt, GenerationConfig(), LogitsProcessorList())
        batch = Batch([row], RollbackCache(torch.zeros(1, dtype=torch.long)), prompt_S[None])
        while not batch.is_done:
            _count(total, costs, loop, batch)
        assert row.text == model.ids_S.tolist(), "decoding changed the text"
    return total


def _count(total: Replayed, costs: PassCosts, loop: DecodingLoop, batch: Batch) -> None:
    """One pass."""
    total.trees += batch.drafts.parent_BK is not None
    outcome = loop.step(batch)
    columns, has_masks = outcome.columns, outcome.plan.masks > 0
    total.tokens += outcome.verified.new_tokens[0]
    total.passes += 1
    total.columns += columns
    total.with_masks += has_masks
    total.cost += costs.of(columns, has_masks)


# ---------------------------------------------------------------- the best in hindsight


def hindsight(texts: list[Text], costs: PassCosts, k: int) -> tuple[int, float]:
    """New tokens, and the least cost of passes that verify only right drafts and compute only masks that are used."""
    return sum(len(text.ids) - text.prompt for text in texts), sum(_least_cost(text, costs, k) for text in texts)


def _least_cost(text: Text, costs: PassCosts, k: int) -> float:
    """Dynamic programming from the end of a text: over the known tokens, and the masks on the last one read."""
    end = len(text.ids)
    least = {(end, masks): 0.0 for masks in range(k + 1)}
    price = {(columns, masked): costs.of(columns, masked) for columns in range(64) for masked in (False, True)}
    looked_up = _right_ngrams(text)
    for known in range(end - 1, text.prompt, -1):
        # By how many drafts are right: the best that can follow.
        follow = [
            min(price[1 + drafts + masks, masks > 0] + least[known + drafts + 1, masks] for masks in range(k + 1))
            for drafts in range(min(MOST, end - known - 1) + 1)
        ]
        for masks in range(k + 1):
            right = max(looked_up[known], _right_drafts(text, known, masks))
            least[known, masks] = min(follow[: right + 1])
    return min(price[1 + masks, masks > 0] + least[text.prompt + 1, masks] for masks in range(k + 1))


def _right_ngrams(text: Text) -> dict[int, int]:
    """How many tokens of the n-gram match are right, by the number of known tokens."""
    index, found = NgramIndex(text.ids[: text.prompt]), {}
    for known in range(text.prompt, len(text.ids)):
        found[known] = count_matching(index.match(MOST).tokens, text.ids[known:-1])
        index.extend([text.ids[known]])
    return found


def _right_drafts(text: Text, known: int, masks: int) -> int:
    """How many tokens of a block's best path are right. A sibling ends it."""
    right = 0
    for candidates, token in zip(text.candidates.get(known - 2, [])[:masks], text.ids[known:-1], strict=False):
        if token not in candidates[:3]:
            break
        right += 1
        if token != candidates[0]:
            break
    return right
