"""Prometheus metrics of a server: its requests, drafts and forward passes."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from ..decoding.statistics import MTPStatistics

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS_PER_PASS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 10)


class Metrics:
    """The metrics of one server, in a registry of their own.

    Acceptance is `accepted_drafts / drafts`, and the tokens per pass of all requests are `generated_tokens /
    row_passes`: both are ratios of counters, so that Prometheus can take them over any time.
    """

    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # processor time and memory, on Linux
        self.requests = self._make(Counter, "requests", "Requests that ended, by how they did.", ["outcome"])
        self.prompt_tokens = self._make(Counter, "prompt_tokens", "Tokens of prompts.")
        self.tokens = self._make(Counter, "generated_tokens", "New tokens.")
        self.passes = self._make(Counter, "forward_passes", "Forward passes of the model, over all rows together.")
        self.row_passes = self._make(Counter, "row_passes", "Forward passes, counted once for each row in the batch.")
        self.drafts = self._make(Counter, "drafts", "Drafts that were verified.")
        self.accepted = self._make(Counter, "accepted_drafts", "Drafts that were accepted.")
        self.running = self._make(Gauge, "running_requests", "Requests in the batch.")
        self.waiting = self._make(Gauge, "waiting_requests", "Requests that wait for room in the batch.")
        self.queue_time = self._histogram("queue_seconds", "From a request's arrival until its prompt is read.")
        self.first_token = self._histogram("first_token_seconds", "From a request's arrival to its first token.")
        self.duration = self._histogram("request_seconds", "From a request's arrival to its end.")
        self.per_pass = self._histogram(
            "tokens_per_pass", "New tokens per forward pass of a request.", TOKENS_PER_PASS
        )

    def _make(self, kind: type, name: str, text: str, labels: list[str] | tuple = (), **options):
        return kind(f"hf_mtp_{name}", text, labels, registry=self.registry, **options)

    def _histogram(self, name: str, text: str, buckets: tuple = SECONDS) -> Histogram:
        return self._make(Histogram, name, text, buckets=buckets)

    def count_pass(self, statistics: MTPStatistics, rows: int) -> None:
        """Counts one pass.

        Args:
            statistics ([`MTPStatistics`]): The counts of this pass alone.
            rows (`int`): Requests in the batch.
        """
        self.running.set(rows)
        self.passes.inc(statistics.forward_passes)
        self.row_passes.inc(statistics.row_passes)
        self.tokens.inc(statistics.tokens)
        self.drafts.inc(statistics.drafted)
        self.accepted.inc(statistics.accepted)

    def count_first_token(self, arrived: float, started: float, answered: float) -> None:
        """Counts a request that has its first token.

        Args:
            arrived, started, answered (`float`): When it came, when its prompt began to be read, and when its first
                token came, by `time.perf_counter`.
        """
        self.queue_time.observe(started - arrived)
        self.first_token.observe(answered - arrived)

    def count_request(self, outcome: str, arrived: float, prompt_tokens: int, tokens: int, passes: int) -> None:
        """Counts a request that ended.

        Args:
            outcome (`str`): `"finished"`, `"cancelled"` or `"failed"`.
            arrived (`float`): When it came, by `time.perf_counter`.
            prompt_tokens, tokens, passes (`int`): Tokens of its prompt, new tokens, and forward passes.
        """
        self.requests.labels(outcome).inc()
        self.prompt_tokens.inc(prompt_tokens)
        self.duration.observe(time.perf_counter() - arrived)
        if passes:
            self.per_pass.observe(tokens / passes)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
