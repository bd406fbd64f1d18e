"""Requests that are decoded one after the other, by `generate`: for models whose rows cannot join a batch.

Knows requests and `generate`. Knows nothing of HTTP.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig
from transformers.cli.serving.utils import InferenceThread
from transformers.generation.streamers import BaseStreamer

from ..decoding.noise import draw_seed
from .metrics import Metrics
from .text import TextStream


class Ended(Exception):
    """Ends a call of `generate` whose further tokens nobody needs."""


@dataclass(eq=False)
class SerialRequest(BaseStreamer):
    """A request, which takes its own tokens as the streamer of `generate`.

    Args:
        inputs (`dict`): Inputs of `generate` for one prompt.
        config ([`~transformers.GenerationConfig`]): The settings.
        seed (`int`, *optional*): Seed of sampling; a random one if `None`.
        number (`int`): Which of several responses to one prompt. Each has a seed of its own, drawn from `seed`.
        text ([`TextStream`]): Its text so far.
        on_text (`Callable[[str], None]` or `None`): Takes the new text of each pass, if it is streamed.
        on_end (`Callable[[Exception | None], None]`): Called once, with the error if there was one.
        arrived (`float`): When it came, by `time.perf_counter`.
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
    is_cancelled: bool = False

    def __post_init__(self):
        self._ids, self._is_prompt = [], True

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
        self._ids += tokens
        self._pass_on(self.text.feed(tokens))
        if self.text.is_stopped:
            raise Ended

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
        error = None
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
        outcome = "failed" if error else "cancelled" if request.is_cancelled else "finished"
        self.metrics.count_request(outcome, request.arrived, request.inputs["input_ids"].shape[-1], 0, 0)
        self.metrics.tokens.inc(len(request.new_ids))
        request.on_end(error)
