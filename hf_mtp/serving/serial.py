"""Requests that are decoded one after the other, by `generate`: for models whose rows cannot join a batch.

Knows requests and `generate`. Knows nothing of HTTP.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig
from transformers.cli.serving.utils import InferenceThread

from ..decoding.noise import draw_seed
from ..decoding.statistics import MTPStatistics
from ..decoding.streaming import PassStreamer
from .metrics import Metrics
from .text import TextStream


class Ended(Exception):
    """Ends a call of `generate` whose further tokens nobody needs."""


@dataclass(eq=False)
class SerialRequest(PassStreamer):
    """A request, which takes its own tokens as the streamer of `generate`.

    Args:
        inputs (`dict`): Inputs of `generate` for one prompt.
        config ([`~transformers.GenerationConfig`]): The settings.
        seed (`int`, *optional*): Seed of sampling; a random one if `None`.
        number (`int`): Which of several responses to one prompt. Each has a seed of its own, drawn from `seed`.
        text ([`TextStream`]): Its text so far.
        on_text (`Callable[[str], None]` or `None`): Takes the new text of each pass, if it is streamed.
        on_end (`Callable[[Exception | None], None]`): Called once, with the error if there was one.
        arrived, started, answered (`float`): When it came, when its prompt began to be read, and when its first token
            came, by `time.perf_counter`.
        is_cancelled (`bool`): Set by any thread; no more tokens are decoded then.
    """

    inputs: dict
    config: GenerationConfig
    seed: int | None
    number: int
    text: TextStream
    on_text: Callable[[str], None] | None
    on_end: Callable[[Exception | None], None]
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    answered: float | None = None
    is_cancelled: bool = False

    def __post_init__(self):
        self._ids, self._is_prompt = [], True
        self._ended_passes, self._is_within_pass = 0, False

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return self.inputs["input_ids"].shape[-1]

    @property
    def passes(self) -> int:
        """Forward passes so far. Plain decoding does not tell where they end, and has one for each token."""
        return self._ended_passes + self._is_within_pass if self._ended_passes else len(self._ids)

    @property
    def new_ids(self) -> list[int]:
        """The new tokens, up to the end of the text."""
        return self._ids[: self.text.tokens]

    @property
    def generator(self) -> torch.Generator | None:
        """The generator of its noise."""
        if self.seed is None:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.number):
            draw_seed(generator)
        return generator

    def put(self, value: torch.Tensor) -> None:
        """Takes a token. The first call has the prompt."""
        if self.is_cancelled:
            raise Ended
        if self._is_prompt:
            self._is_prompt = False
            return
        tokens = value.flatten().tolist()
        self.answered = self.answered or time.perf_counter()
        self._ids += tokens
        self._is_within_pass = True
        self._pass_on(self.text.feed(tokens))
        if self.text.is_stopped:
            raise Ended

    def end_pass(self) -> None:
        """Counts a pass."""
        self._ended_passes += 1
        self._is_within_pass = False

    def end(self) -> None:
        """Passes on text that might have been the start of a stop string."""
        self._pass_on(self.text.end())

    def _pass_on(self, text: str) -> None:
        if text and self.on_text is not None:
            self.on_text(text)


class SerialDecoder:
    """Decodes requests in the order in which they come, in a thread of its own.

    Args:
        model ([`~peft.PeftModel`]): The upgraded model.
        strategy (`str`): As `mtp_strategy` of `generate`.
        metrics ([`Metrics`]): Counts to add to.
    """

    is_alive = True

    def __init__(self, model, strategy: str, metrics: Metrics):
        self.model, self.strategy, self.metrics = model, strategy, metrics
        self._thread = InferenceThread()

    def submit(self, request: SerialRequest) -> None:
        """Adds a request."""
        self.metrics.waiting.inc()
        self._thread.submit(self._decode, request)

    def stop(self) -> None:
        """Does nothing: the thread ends with the process."""

    def _decode(self, request: SerialRequest) -> None:
        self.metrics.waiting.dec()
        self.metrics.running.set(1)
        request.started = time.perf_counter()
        earlier, error = self.model.mtp_statistics, None
        try:
            self.model.generate(
                **request.inputs,
                generation_config=request.config,
                streamer=request,
                mtp=True,
                mtp_strategy=self.strategy,
                generator=request.generator,
            )
        except Ended:
            pass
        except Exception as failure:  # of this request alone
            error = failure
        self.metrics.running.set(0)
        counts = self.model.mtp_statistics
        self._count(request, error, None if counts is earlier else counts)
        request.on_end(error)

    def _count(self, request: SerialRequest, error: Exception | None, counts: MTPStatistics | None) -> None:
        """Counts a request that ended. Of one that was cut off, or decoded plainly, no drafts are known."""
        metrics, tokens = self.metrics, len(request.new_ids)
        outcome = "failed" if error else "cancelled" if request.is_cancelled else "finished"
        metrics.count_request(outcome, request.arrived, request.prompt_tokens, tokens, request.passes)
        if request.answered is not None:
            metrics.count_first_token(request.arrived, request.started, request.answered)
        metrics.tokens.inc(tokens)
        metrics.row_passes.inc(request.passes)
        metrics.passes.inc(request.passes if counts is None else counts.forward_passes)
        if counts is not None:
            metrics.drafts.inc(counts.drafted)
            metrics.accepted.inc(counts.accepted)
