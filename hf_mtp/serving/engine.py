"""The engine of a server: one thread that decodes all requests in one batch, which rows join and leave between passes.

Knows the decode loop and requests. Knows nothing of HTTP.
"""

import queue
import threading
import time

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import logging

from ..adapter.tuner import GatedLoraTuner
from ..cache.rollback import RollbackCache
from ..decoding.batch import Batch
from ..decoding.drafters.acceptance import SIBLINGS
from ..decoding.drafters.masks import MaskDrafter
from ..decoding.loop import DecodingLoop
from ..decoding.outcome import Outcome
from ..decoding.schedule.adaptive import AdaptiveSchedule
from ..decoding.schedule.costs import PassCosts
from ..decoding.schedule.fixed import FixedSchedule
from ..decoding.sequence import Sequence
from ..decoding.statistics import MTPStatistics
from ..decoding.verifier import Verifier
from ..passes.decoding_pass import DecodingPass
from .metrics import Metrics
from .request import Request
from .rules import RowVerifier, Rules

logger = logging.get_logger(__name__)

WARM_UP_TOKENS = 16  # of the prompt on which passes are timed


class Engine:
    """Decodes requests of many clients with one upgraded model, whose speculation mode must be a tree.

    Args:
        tuner ([`GatedLoraTuner`]): The upgraded model.
        strategy (`str`, *optional*, defaults to `"auto"`): As `mtp_strategy` of `generate`.
        max_rows (`int`, *optional*, defaults to 16): Maximum number of requests in the batch. Others wait.
        metrics ([`Metrics`], *optional*): Counts to add to.
    """

    def __init__(
        self, tuner: GatedLoraTuner, strategy: str = "auto", max_rows: int = 16, metrics: Metrics | None = None
    ):
        self.metrics = metrics or Metrics()
        self.loop = _loop(tuner, strategy)
        # Where the longest row decides which rotary embeddings all rows get, a request is exact only by itself.
        forward = self.loop.forward
        self.max_rows = 1 if forward.switches or forward.scaled_columns else max_rows
        self.batch: Batch | None = None
        self.requests: dict[Sequence, Request] = {}
        self.waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._costs: PassCosts | None = None
        self._ready, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="hf_mtp engine", daemon=True)
        self._thread.start()
        self._ready.wait()  # what others compute meanwhile would count as the cost of a pass

    def submit(self, request: Request) -> None:
        """Adds a request, which is decoded as soon as there is room.

        Args:
            request ([`Request`]): The request, which receives its tokens.

        Raises:
            RuntimeError: The engine was stopped.
        """
        if not self.is_alive:
            raise RuntimeError("The server is shutting down. Send the request again later.")
        self.metrics.waiting.inc()
        self.waiting.put(request)

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._stopping.is_set()

    def stop(self) -> None:
        """Ends all requests with an error, and the thread after the current pass."""
        self._stopping.set()
        self.waiting.put(None)  # wakes the thread
        self._thread.join()

    # ---------------------------------------------------------------- the thread

    @torch.no_grad()
    def _run(self) -> None:
        self._warm_up()
        self._ready.set()
        while not self._stopping.is_set():
            try:
                self._admit()
                self._retire()
                if self.batch is not None:
                    self._deliver(self._pass(self.batch))
            except Exception as error:  # of the whole batch, such as running out of memory
                logger.exception("A forward pass failed, and so did the requests in its batch.")
                self._fail(error)
        self._fail(RuntimeError("The server is shutting down."))
        while not self.waiting.empty():
            request = self.waiting.get()
            if request is not None:
                request.on_end(RuntimeError("The server is shutting down."))

    def _admit(self) -> None:
        """Reads the prompts of waiting requests while there is room; waits for one if there is nothing to do."""
        while len(self.requests) < self.max_rows and not self._stopping.is_set():
            try:
                request = self.waiting.get(block=self.batch is None)
            except queue.Empty:
                return
            if request is None:
                return
            self.metrics.waiting.dec()
            if request.is_cancelled:
                self._end(request)
            else:
                self._read_prompt(request)

    def _read_prompt(self, request: Request) -> None:
        request.started = time.perf_counter()
        sequence = request.sequence
        self.requests[sequence], self.loop.verifier.rules[sequence] = request, request.row.rules
        try:
            batch = request.row.read_by(self.loop.forward.model)
            self._deliver(self._pass(batch))
        except Exception as error:  # of this request alone
            self._end(request, error)
            return
        if sequence.is_finished:
            self._end(request)
        elif self.batch is None:
            self.batch = batch
        else:
            self.batch.admit(batch)

    def _retire(self) -> None:
        """Takes rows out of the batch that are finished or whose clients have gone."""
        if self.batch is None:
            return
        for sequence in self.batch.sequences:
            if self.requests[sequence].is_cancelled:
                sequence.finish()
        for sequence in [sequence for sequence in self.batch.sequences if sequence.is_finished]:
            self._end(self.requests[sequence], self.loop.verifier.errors.get(sequence))
        if self.batch.is_done:
            self.batch = None
        else:
            self.batch.retire()

    def _pass(self, batch: Batch) -> Outcome:
        """One pass of the decode loop, and its counts."""
        schedule, rows = self.loop.schedule, max(1, len(self.requests))
        if isinstance(schedule, AdaptiveSchedule) and self._costs is not None:
            schedule.costs = costs_of_rows(self._costs, rows)
        self.loop.statistics = MTPStatistics()
        outcome = self.loop.step(batch)
        self.metrics.count_pass(self.loop.statistics, rows)
        return outcome

    def _deliver(self, outcome: Outcome) -> None:
        for sequence, tokens in zip(outcome.sequences, outcome.verified.tokens, strict=True):
            request = self.requests[sequence]
            is_first = request.passes == 0
            try:
                request.receive(tokens)
            except Exception:  # nobody listens any more
                request.is_cancelled = True
            if is_first:
                self.metrics.count_first_token(request.arrived, request.started, time.perf_counter())

    def _fail(self, error: Exception) -> None:
        """Ends all requests of the batch with an error."""
        self.batch = None
        for request in list(self.requests.values()):
            self._end(request, error)

    def _end(self, request: Request, error: Exception | None = None) -> None:
        self.requests.pop(request.sequence, None)
        self.loop.verifier.rules.pop(request.sequence, None)
        self.loop.verifier.errors.pop(request.sequence, None)
        self.metrics.running.set(len(self.requests))
        outcome = "failed" if error else "cancelled" if request.is_cancelled else "finished"
        self.metrics.count_request(
            outcome, request.arrived, request.prompt_tokens, request.sequence.new_tokens, request.passes
        )
        try:
            request.on_end(error)
        except Exception as lost:
            logger.info("Nobody waits for the end of a request: %s", lost)

    def _warm_up(self) -> None:
        """Reads a short prompt. Passes of several sizes then tell the adaptive schedule what they cost here."""
        tuner, loop = self.loop.forward.tuner, self.loop
        ids_S = torch.arange(min(WARM_UP_TOKENS, loop.forward.positions_left(0) // 2), device=tuner.model.device)
        sequence = Sequence(ids_S % tuner.vocab_size, 0, 0, loop.k + 2, GenerationConfig(), LogitsProcessorList())
        loop.verifier.rules[sequence] = Rules.of(Verifier(sequence.processors, StoppingCriteriaList(), 1), False)
        batch = Batch([sequence], RollbackCache(torch.zeros_like(ids_S[:1])), sequence.ids_1S)
        try:
            loop.step(batch)
            # A layer that a text leaves empty holds an image only, which the rows of a batch would have to share.
            if not all(layer.is_initialized for layer in batch.cache.layers):
                self.max_rows = 1
            if isinstance(loop.schedule, AdaptiveSchedule):
                loop.measure_costs(batch, lambda seconds: seconds)
                self._costs = loop.schedule.costs
        except Exception as error:  # requests will say what is wrong
            logger.warning("The first passes failed, so their costs are unknown: %s", error)
        del loop.verifier.rules[sequence]


def _loop(tuner: GatedLoraTuner, strategy: str) -> DecodingLoop:
    """The decode loop, whose verifier and drafter know the settings of each row."""
    k, verifier = tuner.active_mtp_config.k, RowVerifier()
    is_auto = strategy == "auto"
    schedule = AdaptiveSchedule(k) if is_auto else FixedSchedule(k, linear=strategy == "linear")
    masks = MaskDrafter(tuner, schedule.mask_acceptance, verifier.processors, SIBLINGS if is_auto else 0)
    masks.warpers = verifier.warp
    lookups = schedule.lookups(tuner.active_mtp_config.ngrams, tuner.vocab_size) if is_auto else []
    return DecodingLoop(DecodingPass(tuner), schedule, [masks, *lookups], verifier, k)


def costs_of_rows(costs: PassCosts, rows: int) -> PassCosts:
    """What passes over several rows cost, by those over one row: so many columns cost the same, in any shape.

    Args:
        costs ([`PassCosts`]): Those of a batch of one row.
        rows (`int`): B.
    """
    if rows == 1:
        return costs
    plain = costs.of(rows, masks=False)
    return PassCosts(
        [(columns, costs.of(rows * columns, masks=False) / plain) for columns, _ in costs.plain],
        [(columns, costs.of(rows * columns, masks=True) / plain) for columns, _ in costs.masked],
    )
