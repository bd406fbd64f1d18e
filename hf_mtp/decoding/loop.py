"""The decode loop: draft, verify, accept, roll back.

One forward pass verifies the drafts of the pass before and computes masks for the next ones. Its regular tokens are
the pending token and its drafts (at first, the prompt); masks follow them, in blocks that hang on the tokens where
decoding may end up. All masks and rejected drafts stand behind what a row's cache counts in, and rolling back is not
counting them.

Shapes: B batch, K drafts per row, T regular columns, M masks per row, R = K + 1 positions with logits, D features.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer

from ..base.cache import RollbackCache
from ..blocks.layout import decoding_layout
from ..blocks.slots import Slots
from .drafting import NO_TOKEN, Drafts, Draw, found_drafts, no_drafts
from .lookup import Lookup, Match
from .pacing import Pacer, Pass, Whole
from .request import Prompt
from .sequence import SequenceCache
from .statistics import MTPStatistics
from .step import MaskedStep, StepOutput
from .transcript import Transcript
from .verification import WARPERS, processors_of_row, verify_in_order, verify_together


@dataclass(frozen=True)
class Task:
    """How to decode.

    Args:
        k (`int`): Drafts per row at most.
        processors ([`~transformers.LogitsProcessorList`]), criteria ([`~transformers.StoppingCriteriaList`]), streamer
            ([`~transformers.generation.streamers.BaseStreamer`], *optional*): As prepared by `generate`.
        draw ([`Draw`], *optional*): Samples; greedy if `None`.
        keep_rows (`bool`): Whether the cache must keep rows that ended.
        fixed_shape (`bool`): Whether every pass has the same number of columns, so that one compiled graph serves all.
        others_unfinished (`Callable`): Whether other processes still decode, told that this one does or does not.
        agreed_seconds (`Callable`): What a pass took for all processes that share the weights, told what it took here.
    """

    k: int
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    streamer: BaseStreamer | None
    draw: Draw | None
    keep_rows: bool
    fixed_shape: bool
    others_unfinished: Callable[[bool], bool]
    agreed_seconds: Callable[[float], float]


def decode(
    step: MaskedStep,
    task: Task,
    prompt: Prompt,
    transcript: Transcript,
    cache: RollbackCache | SequenceCache,
    pace: Whole | Pacer,
    statistics: MTPStatistics,
) -> None:
    """Speculative decoding of a batch.

    Args:
        step ([`MaskedStep`]): The upgraded model's forward pass.
        task ([`Task`]): How to decode.
        prompt ([`Prompt`]): What to go on from.
        transcript ([`Transcript`]): Of all rows, these among them; extended in place.
        cache ([`RollbackCache`] or [`SequenceCache`]): The tokens before the prompt; afterwards, all but each row's
            last.
        pace ([`Whole`] or [`Pacer`]): The strategy.
        statistics ([`MTPStatistics`]): Counted on.
    """
    batch = Batch(task, transcript, prompt.rows, cache.rows.starts, looks_up=pace.lookups is not None)
    regular_BT, drafts = prompt.unread_BT, no_drafts(len(batch.rows), prompt.unread_BT.device)
    began = None  # a prompt's pass is of no use as a measure
    while True:
        # One pass over what the cache lacks, the drafts, and masks on the tokens that may turn out last.
        columns = regular_BT.shape[1]
        before = columns - 1 - drafts.count  # columns of the prompt before its last
        room = min(
            batch.room - 2, step.positions_left(cache.rows.positions + columns) - 1
        )  # drafts stand behind their masks
        slots = pace.slots(drafts, task.k if task.fixed_shape else max(0, min(task.k, room)))
        layout = decoding_layout(cache.rows.next_columns(columns) - cache.rows.start_B[:, None], slots, first=before)
        output = step(regular_BT, layout, cache, logits_rows=1 + drafts.count)

        outcome = batch.verify(output, drafts, slots)
        statistics.count_pass(outcome.new_tokens, outcome.offered, outcome.accepted, batch.takes, output.calls)

        # What was accepted stays in the cache, with the token before it; masks and rejected drafts go.
        cache.keep([before * (new > 0) + new for new in outcome.new_tokens])
        if not task.others_unfinished(batch.is_done):
            return
        began, before_began = time.perf_counter(), began
        if before_began is not None:
            seconds = task.agreed_seconds(began - before_began)
            pace.observe(batch.describe(outcome, columns - 1, layout.masks, seconds))

        # Each row's next drafts are what followed such words before, or what the block on its last token says.
        room = min(batch.room - 1, step.positions_left(cache.rows.positions + 1))
        found = batch.look_up(outcome, pace, room)
        count = pace.fixed_drafts(task.k) if task.fixed_shape else min(max(outcome.next_drafts), batch.room - 1)
        drafts, regular_BT = no_drafts(len(batch.rows), regular_BT.device), outcome.pending_B[:, None]
        if count > 0 and not all(batch.takes):
            column_BK = slots.column_BRk[torch.arange(len(batch.rows)), outcome.accepted_B, :count]
            drafts = step.draft(outcome.pending_B, output.block(column_BK), task.draw).where(column_BK >= 0)
        if found is not None:
            drafts = drafts.overridden_by(found) if drafts.count else found
        if drafts.count:
            regular_BT = torch.cat([regular_BT, drafts.token_BK.clamp(min=0)], dim=1)
        if (alive := batch.drop_finished()) is not None:
            cache.select_rows(alive)
            drafts, regular_BT = drafts.select_rows(alive), regular_BT[alive]


@dataclass(frozen=True)
class Outcome:
    """What one pass gave, per row of the batch.

    Args:
        tokens (`list[list[int]]`): Tokens returned to the user.
        offered, accepted (`list[int]`): Drafts verified, and how many of these were accepted.
        pending_B (`torch.LongTensor` of shape `(B,)`): The token that comes next, not yet read by the model.
        accepted_B (`torch.LongTensor` of shape `(B,)`): `accepted`, where kernels can read it.
        next_drafts (`list[int]`): Drafts that the pass's masks can give.
    """

    tokens: list[list[int]]
    offered: list[int]
    accepted: list[int]
    pending_B: torch.LongTensor
    accepted_B: torch.LongTensor
    next_drafts: list[int]

    @property
    def new_tokens(self) -> list[int]:
        """How many tokens were returned."""
        return [len(tokens) for tokens in self.tokens]


class Batch:
    """The rows still being decoded.

    Args:
        task ([`Task`]): How to decode.
        transcript ([`Transcript`]): Of all rows.
        rows (`list[int]`): Their numbers in the transcript.
        starts (`list[int]`): Columns of padding at the left of each prompt.
        looks_up (`bool`): Whether drafts may come from a row's own text.
    """

    def __init__(self, task: Task, transcript: Transcript, rows: list[int], starts: list[int], looks_up: bool):
        self.task, self.transcript, self.rows = task, transcript, rows
        self.takes = [0] * len(self.rows)  # looked up drafts of each row
        self.lookups, self.matches = None, [Match(0, [])] * len(self.rows)
        if looks_up:
            self.lookups = {
                row: Lookup(transcript.prefix(row)[0, start:].tolist())
                for row, start in zip(rows, starts, strict=True)
            }
        self.ends = {
            token
            for criterion in task.criteria
            if type(criterion) is EosTokenCriteria
            for token in criterion.eos_token_id.tolist()
        }
        # Criteria that hold for a token whatever its prefix are asked by numbers, and all rows are verified at once.
        known = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)
        self.in_order = any(type(processor) not in WARPERS for processor in task.processors) or any(
            type(criterion) not in known for criterion in task.criteria
        )
        self.clocks = [criterion for criterion in task.criteria if type(criterion) is MaxTimeCriteria]
        self.row_processors = {row: processors_of_row(task.processors, row, len(transcript)) for row in rows}

    @property
    def is_done(self) -> bool:
        return all(self.transcript.finished[row] for row in self.rows)

    @property
    def room(self) -> int:
        """New tokens that the row with most room may still get."""
        return max(self.transcript.room_of(row) for row in self.rows)

    def verify(self, output: StepOutput, drafts: Drafts, slots: Slots) -> Outcome:
        """Extends the transcript by the drafts that hold, and by one token more per row."""
        before = [self.transcript.new_tokens[row] for row in self.rows]
        verify = self._verify_in_order if self.in_order else self._verify_together
        outcome = verify(output, drafts, slots)
        if self.clocks and any(bool(clock(self.transcript.prefix(0), None).all()) for clock in self.clocks):
            for row in self.rows:
                self.transcript.finish(row)
        for index, row in enumerate(self.rows):
            self.transcript.record_states(row, before[index], output.states_of_row(index))
        if self.task.streamer is not None and outcome.new_tokens[0]:
            self.task.streamer.put(self.transcript.prefix(0)[0, -outcome.new_tokens[0] :].cpu())
        return outcome

    def _verify_together(self, output: StepOutput, drafts: Drafts, slots: Slots) -> Outcome:
        token_BR, accepted_B, score_BRV = verify_together(
            output.logits_BRV, drafts, self.task.draw, self.task.processors
        )
        if drafts.count or slots.alive_BM.shape[1]:
            next_B1 = slots.drafts_BR.gather(1, accepted_B[:, None])
            offered_B1 = (drafts.token_BK != NO_TOKEN).sum(dim=1, keepdim=True)
            numbers = torch.cat([token_BR, accepted_B[:, None], offered_B1, next_B1], dim=1)
        else:  # a plain pass
            numbers = torch.nn.functional.pad(token_BR, (0, 3))
        read = numbers.tolist()  # the one time that the host waits for the device
        returned, accepted_counts = [], []
        for index, row in enumerate(self.rows):
            *tokens, accepted, _, _ = read[index]
            tokens = [] if self.transcript.finished[row] else tokens[: min(accepted + 1, self.transcript.room_of(row))]
            end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
            if end is not None:
                tokens = tokens[: end + 1]
            if end is not None or len(tokens) == self.transcript.room_of(row):
                self.transcript.finish(row)
            count = len(tokens)
            self.transcript.append(
                row, token_BR[index, :count], output.logits_BRV[index, :count], score_BRV[index, :count]
            )
            returned.append(tokens)
            accepted_counts.append(min(accepted, count))
        return Outcome(
            returned,
            [offered for *_, offered, _ in read],
            accepted_counts,
            token_BR.gather(1, accepted_B[:, None])[:, 0],
            accepted_B,
            [drafts for *_, drafts in read],
        )

    def _verify_in_order(self, output: StepOutput, drafts: Drafts, slots: Slots) -> Outcome:
        returned, accepted = [], []
        for index, row in enumerate(self.rows):
            before, own = self.transcript.new_tokens[row], drafts.select_rows(slice(index, index + 1))
            accepted.append(
                0
                if self.transcript.finished[row]
                else verify_in_order(
                    self.transcript,
                    row,
                    output.logits_BRV[index],
                    own,
                    self.task.draw,
                    self.row_processors[row],
                    self.task.criteria,
                )
            )
            new = self.transcript.new_tokens[row] - before
            returned.append(self.transcript.prefix(row)[0, -new:].tolist() if new else [])
        accepted_B = torch.tensor(accepted, device=drafts.token_BK.device)
        return Outcome(
            returned,
            (drafts.token_BK != NO_TOKEN).sum(dim=1).tolist(),
            accepted,
            torch.cat([self.transcript.prefix(row)[0, -1:] for row in self.rows]),
            accepted_B,
            slots.drafts_BR.gather(1, accepted_B[:, None])[:, 0].tolist(),
        )

    def describe(self, outcome: Outcome, drafts: int, masks: int, seconds: float) -> Pass:
        """What the strategy learns from a pass."""
        by_masks = [
            (offered, accepted)
            for offered, accepted, taken in zip(outcome.offered, outcome.accepted, self.takes, strict=True)
            if offered and not taken
        ]
        return Pass(drafts, masks, sum(outcome.new_tokens), len(self.rows), by_masks, seconds)

    def look_up(self, outcome: Outcome, pace: Whole | Pacer, room: int) -> Drafts | None:
        """Drafts for the rows that are better off with what followed the same words before; `None` if no row is."""
        if self.lookups is None:
            return None
        pace.lookups.compare(self.matches, outcome.tokens)
        for index, row in enumerate(self.rows):
            self.lookups[row].extend(outcome.tokens[index])
        wanted = max(0, min(pace.lookups.MOST_DRAFTS, room))
        self.matches = [
            Match(0, []) if self.transcript.finished[row] else self.lookups[row].match(wanted) for row in self.rows
        ]
        self.takes = pace.lookups_to_take(self.matches, outcome.next_drafts)
        if not any(self.takes):
            return None
        return found_drafts(
            [match.tokens[:taken] for match, taken in zip(self.matches, self.takes, strict=True)],
            [pace.lookups.confidences(match)[:taken] for match, taken in zip(self.matches, self.takes, strict=True)],
            outcome.pending_B.device,
            drawn=self.task.draw is not None,
        )

    def drop_finished(self) -> list[int] | None:
        """Leaves out rows that ended, unless they are to be kept.

        Returns:
            `list[int]`: Places in the batch of the rows that stay; `None` if all do.
        """
        alive = [index for index, row in enumerate(self.rows) if not self.transcript.finished[row]]
        if self.task.keep_rows or not alive or len(alive) == len(self.rows):
            return None
        self.rows, self.takes, self.matches = (
            [values[index] for index in alive] for values in (self.rows, self.takes, self.matches)
        )
        return alive
