"""The decode loop: draft, verify, accept, roll back.

One forward pass verifies the drafts of the previous pass, and computes masks for the next drafts. Its regular tokens
are each row's pending token and its drafts, a chain or a tree (in the first pass, the prompt). They are followed by
blocks of masks, anchored to these tokens, since decoding may continue after any of them. The cache then keeps the
accepted tokens and rolls the others back.

Does not depend on how drafts are made, verified or scheduled.

Shapes: B batch, T regular columns, K drafts per row, k masks per block.
"""

from collections.abc import Callable
from functools import partial

import torch

from ..base.caches import is_dropped
from ..base.inspection import has_more_tables
from ..cache.rollback import RollbackCache
from ..layout.blocks import BlockLayout, decoding_layout
from ..layout.mask_plan import MaskPlan, choose_masks
from ..passes.decoding_pass import DecodingPass
from .batch import Batch
from .drafters.base import NO_TOKEN, Drafter, Drafts, no_drafts
from .outcome import Outcome
from .schedule.base import Schedule
from .schedule.costs import MASKED_COLUMNS, PLAIN_COLUMNS, measure_costs
from .statistics import MTPStatistics
from .verification import chosen_tokens
from .verifier import Verifier

LONG_PROMPT = 512  # tokens; the attention mask of a padded prompt with masks grows with the square of its length


class DecodingLoop:
    """Decodes a batch, pass by pass. Rows may be admitted and retired between passes.

    Args:
        forward ([`DecodingPass`]): The upgraded model's forward pass.
        schedule ([`Schedule`]): Which masks to compute, and which drafts to verify.
        drafters (`list[Drafter]`): Sources of drafts. The first one drafts from masks.
        verifier ([`Verifier`]): Decides which tokens are accepted.
        k (`int`): Most masks per block.
        fixed_shape (`bool`): Whether all passes have the same number of columns, so that they share a compiled graph.
        statistics ([`MTPStatistics`], *optional*): Counts to add to; new ones if `None`.
    """

    def __init__(
        self,
        forward: DecodingPass,
        schedule: Schedule,
        drafters: list[Drafter],
        verifier: Verifier,
        k: int,
        fixed_shape: bool = False,
        statistics: MTPStatistics | None = None,
    ):
        self.forward, self.schedule, self.drafters, self.verifier = forward, schedule, drafters, verifier
        self.k, self.fixed_shape = k, fixed_shape
        self.statistics = MTPStatistics() if statistics is None else statistics

    def step(self, batch: Batch) -> Outcome:
        """Runs one pass: verifies the batch's drafts, keeps the accepted tokens, and makes the next drafts.

        Args:
            batch ([`Batch`]): Changed in place.
        """
        if self._must_read_again(batch):
            batch.read_again()
        plan, layout = self._plan(batch)
        output = self.forward(batch.unread_BT, layout, batch.cache, logits_rows=1 + batch.drafts.count)
        verified = self.verifier(batch, output)
        columns = 1 + batch.drafts.count + plan.masks
        outcome = Outcome(batch.sequences, columns, plan, output, verified, batch.origins)
        # The cache keeps the pending token and the accepted drafts. Masks and rejected drafts are rolled back.
        before = batch.unread_BT.shape[1] - 1 - batch.drafts.count
        if verified.columns is not None:
            batch.cache.gather(verified.columns)
        batch.cache.keep([before * (new > 0) + new for new in verified.new_tokens])
        self._observe(outcome)
        self._draft(batch, outcome)
        return outcome

    def _must_read_again(self, batch: Batch) -> bool:
        """Whether plain decoding would drop the cache, which happens only where rotary embeddings change."""
        held, confirmed = batch.cache.rows.longest, batch.unread_BT.shape[1] - batch.drafts.count
        if not any(held <= end < held + confirmed for end in self.forward.switches):
            return False
        ids_BS = torch.cat([sequence.ids_1S for sequence in batch.sequences])
        return isinstance(batch.cache, RollbackCache) and is_dropped(batch.cache, self.forward.model, ids_BS)

    def _plan(self, batch: Batch) -> tuple[MaskPlan, BlockLayout]:
        """The mask plan of the next pass, and the layout of its columns."""
        cache, regular = batch.cache, batch.unread_BT.shape[1]
        before = regular - 1 - batch.drafts.count  # columns of the prompt before its last
        # A draft has the position after its mask. A tree of drafts is at most as deep as it has columns.
        positions = self.forward.positions_left(cache.rows.positions + before + 1) - batch.drafts.count - 1
        k = max(0, min(self.k, batch.remaining_tokens - 2, positions))
        is_long = before > LONG_PROMPT and any(cache.rows.starts)
        # Such a model finds the ids of embeddings by looking them up in its table, which has no masks.
        is_embedded = batch.unread_BT.dim() == 3 and has_more_tables(self.forward.model)
        if is_long or is_embedded or (before and self.forward.bitwise):
            k = 0
        plan = self.schedule.plan_masks(batch.drafts, self.k if self.fixed_shape else k)
        places_BT = cache.rows.next_places(regular)
        return plan, decoding_layout(places_BT, plan, first=before, parent_BK=batch.drafts.parent_BK)

    def _observe(self, outcome: Outcome) -> None:
        self.statistics.count_pass(outcome)
        for drafter in self.drafters:
            drafter.observe(outcome)
        self.schedule.observe(outcome)

    def _draft(self, batch: Batch, outcome: Outcome) -> None:
        """Makes the drafts that the next pass verifies."""
        pending_B = outcome.verified.pending_B
        drafts, origins = no_drafts(len(batch.sequences), pending_B.device), [[] for _ in batch.sequences]
        if not batch.is_done:
            expected = self._expected(batch, outcome)
            proposals = [
                drafter.propose(outcome, counts) if any(counts) else None
                for drafter, counts in zip(self.drafters, self.schedule.counts(expected), strict=True)
            ]
            drafts, origins = self.schedule.choose(expected, proposals, pending_B.device)
            if self.fixed_shape:
                drafts = drafts.padded(self.schedule.fixed_drafts(self.k))
        drafts = self._scaled_alike(batch, drafts)
        if self.verifier.keeps_rows_in_step and self.verifier.pad_token is not None:
            drafts = self._with_padding(batch, drafts)
        batch.set_drafts(pending_B, drafts, origins)

    def _expected(self, batch: Batch, outcome: Outcome) -> list[list[list[float]]]:
        """What each drafter expects of its drafts, for as many as a row may still verify."""
        positions = self.forward.positions_left(batch.cache.rows.positions + 1)
        return [
            [
                row[: max(0, min(positions, sequence.remaining_tokens - 1))] if not sequence.is_finished else []
                for row, sequence in zip(drafter.expect(outcome), batch.sequences, strict=True)
            ]
            for drafter in self.drafters
        ]

    def _scaled_alike(self, batch: Batch, drafts: Drafts) -> Drafts:
        """Drops drafts of a tree in columns where the model scales attention in another way than before them."""
        step = self.forward.scaled_columns
        if step is None or drafts.parent_BK is None:
            return drafts
        alike = step - 1 - (batch.cache.rows.longest + 1) % step  # columns after that of the pending token
        return drafts.where(torch.arange(drafts.count, device=drafts.token_BK.device) < alike)

    def _with_padding(self, batch: Batch, drafts: Drafts) -> Drafts:
        """Drafts padding for rows that ended, which continue with it."""
        ended = [index for index, row in enumerate(batch.sequences) if row.is_finished]
        token_BK, parent_BK = drafts.token_BK.clone(), drafts.parents_BK.clone()
        # A chain of as many drafts as a tree has columns may be deeper than there are positions left.
        depth = min(drafts.count, self.forward.positions_left(batch.cache.rows.positions + 1))
        token_BK[ended], parent_BK[ended] = NO_TOKEN, 0
        token_BK[ended, :depth] = self.verifier.pad_token
        parent_BK[ended, :depth] = torch.arange(depth, device=parent_BK.device)
        return Drafts(token_BK, drafts.confidence_BK, None if drafts.parent_BK is None else parent_BK)

    def measure_costs(self, batch: Batch, agreed: Callable[[float], float]) -> None:
        """Times passes of several sizes on a batch, without changing it, for an adaptive schedule.

        Args:
            batch ([`Batch`]): A batch whose prompts have been read.
            agreed (`Callable`): See [`~hf_mtp.base.distributed.agreed_seconds`].
        """
        most = min(1 + self.k + (self.k + 1) * self.k, self.forward.positions_left(batch.cache.rows.positions + 1))
        if self.fixed_shape:
            self.schedule.costs = measure_costs(partial(self._run, batch), (), (1 + 3 * self.k,), agreed)
        elif most > 2:
            self.schedule.costs = measure_costs(
                partial(self._run, batch),
                sorted({min(columns, most) for columns in PLAIN_COLUMNS}),
                sorted({min(columns, most) for columns in MASKED_COLUMNS}),
                agreed,
                warm_up=self.forward.bitwise,
            )

    def _run(self, batch: Batch, columns: int, with_masks: bool) -> None:
        """Runs a pass over arbitrary tokens in so many columns, and rolls all of them back."""
        rows, pending_B = len(batch.sequences), batch.unread_BT[:, 0]
        least = -(-(columns - 1 - self.k) // (self.k + 1))  # enough blocks for the masks
        drafted = max(least, min(self.k, (columns - 1) // 3)) if with_masks else columns - 1
        # Not `expand`: other strides than those of decoding would need another compiled graph.
        regular_BT = pending_B[:, None].repeat(1, 1 + drafted)
        value_BRk = torch.ones(rows, 1 + drafted, self.k, device=pending_B.device)
        plan = choose_masks(value_BRk, columns - 1 - drafted)
        # With drafts, rows advance unequally, and a pass over rows of unequal lengths takes longer.
        ahead = [columns > 1 and not self.verifier.keeps_rows_in_step and row % 2 for row in range(rows)]
        batch.cache.keep(ahead)
        layout = decoding_layout(batch.cache.rows.next_places(1 + drafted), plan)
        output = self.forward(regular_BT, layout, batch.cache, logits_rows=1 + drafted)
        batch.cache.keep([-columns for columns in ahead])
        last = chosen_tokens(output.logits_BRV, None)
        if with_masks:
            column_BK = plan.column_BRk[:, 0, : min(self.k, plan.masks)]
            states, logits = output.block(column_BK), output.block_logits(column_BK)
            last = self.forward.tuner.draft(pending_B, states, logits_BKV=logits).token_BK
        last.tolist()  # waits for the device
