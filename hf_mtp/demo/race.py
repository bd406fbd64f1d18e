"""Races plain decoding against `generate(mtp=True)` on one prompt, in turns.

Plain decoding runs the base's own `generate` on a copy of its modules that shares the weights and has no adapter.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..decoding.statistics import MTPGenerateOutput
from ..evaluation.compare import same_weights
from ..passes.decoding_pass import DecodingPass
from .lane import Lane, LaneState, MTPStreamer, PlainStreamer
from .plain_sampling import mtp_options, plain_options
from .settings import SLOW_PAUSE, RaceSettings, refuse_unless_fits
from .turns import Cancelled, Turns

PLAIN, MTP = 0, 1
WARM_UP_PROMPT, WARM_UP_TOKENS = "The", 8


@dataclass(frozen=True)
class Frame:
    """Both sides of a race at one moment.

    Args:
        plain ([`LaneState`]), mtp ([`LaneState`]): The sides.
    """

    plain: LaneState
    mtp: LaneState

    @property
    def is_finished(self) -> bool:
        """Whether both texts are complete."""
        return self.plain.is_finished and self.mtp.is_finished

    @property
    def speedup(self) -> float:
        """How many times as fast multi-token prediction is, by the clocks of both."""
        return self.mtp.tokens_per_second / self.plain.tokens_per_second if self.plain.ids else 0.0

    @property
    def same_tokens(self) -> int:
        """How many tokens both texts have in common from their start."""
        pairs = zip(self.plain.ids, self.mtp.ids, strict=False)
        shorter = min(len(self.plain.ids), len(self.mtp.ids))
        return next((place for place, (one, two) in enumerate(pairs) if one != two), shorter)

    @property
    def is_same_text(self) -> bool:
        """Whether both texts are equal, token by token."""
        return self.plain.ids == self.mtp.ids


class RaceTrack:
    """One upgraded model on which races are run, one at a time.

    Args:
        model ([`~peft.PeftModel`]): An upgraded model in evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.

    Raises:
        ValueError: The model decodes plainly, so there is nothing to race.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self.base: PreTrainedModel = same_weights(model).unload().eval()
        self.k: int = model.base_model.active_mtp_config.k
        self.context = DecodingPass(model.base_model).positions_left(0)
        self.can_be_bitwise = self._can_be_bitwise()
        self._known: set[tuple] = set()
        self._busy = threading.Lock()  # while a race runs

    def defaults(self, prompt: str, max_new_tokens: int) -> RaceSettings:
        """The settings that suit the model: bit for bit where the text could differ otherwise, if that is possible.

        Args:
            prompt (`str`), max_new_tokens (`int`): As in [`RaceSettings`].
        """
        is_half = self.model.dtype.itemsize < 4
        return RaceSettings(prompt, max_new_tokens, self.k, bitwise=is_half and self.can_be_bitwise)

    def warm_up(self, settings: RaceSettings) -> None:
        """Does what the first call with these settings does once, such as timing passes.

        Args:
            settings ([`RaceSettings`]): Its prompt is not read.

        Raises:
            ValueError: The model decodes plainly.
            NotImplementedError: The model does not allow the strategy, or bit-for-bit decoding.
        """
        key = settings.strategy, settings.k, settings.bitwise
        if key in self._known:
            return
        ids_1T = self.prompt_ids(WARM_UP_PROMPT)
        self.base.generate(**_inputs(ids_1T), do_sample=False, max_new_tokens=2)
        options = {"do_sample": False, "max_new_tokens": WARM_UP_TOKENS, "return_dict_in_generate": True}
        output = self.model.generate(**_inputs(ids_1T), **_mtp(settings), **options)
        if not isinstance(output, MTPGenerateOutput):
            raise ValueError(
                "This model only supports plain decoding, one token per pass, so there is nothing to race."
            )
        self._known.add(key)

    def run(self, settings: RaceSettings, seconds_between: float = 0.12) -> Iterator[Frame]:
        """Runs a race, and yields frames until both sides are finished. Closing the iterator cancels the race.

        Args:
            settings ([`RaceSettings`]): The settings.
            seconds_between (`float`, *optional*, defaults to 0.12): From one frame to the next.

        Raises:
            ValueError: The settings are not valid, or the prompt does not fit into the context.
            NotImplementedError: The model does not allow the strategy, or bit-for-bit decoding.
        """
        settings.refuse_unless_valid(self.k)
        prompt_1T = self.prompt_ids(settings.prompt)
        refuse_unless_fits(prompt_1T.shape[1], settings.max_new_tokens, self.context)
        self.warm_up(settings)
        turns = Turns(2, SLOW_PAUSE if settings.slow else 0.0)
        lanes = [Lane(number, turns, self.tokenizer, prompt_1T[0].tolist()) for number in (PLAIN, MTP)]
        with self._busy:
            yield from self._run(settings, turns, lanes, seconds_between)

    def wait_until_free(self, timeout: float = 10.0) -> None:
        """Waits until no race runs, but not longer than a number of seconds.

        Args:
            timeout (`float`, *optional*, defaults to 10): That number.
        """
        if self._busy.acquire(timeout=timeout):
            self._busy.release()

    def _run(self, settings: RaceSettings, turns: Turns, lanes: list[Lane], seconds_between: float) -> Iterator[Frame]:
        calls = self.calls(settings, PlainStreamer(lanes[PLAIN]), MTPStreamer(lanes[MTP]))
        runners = [_Runner(lane, call) for lane, call in zip(lanes, calls, strict=True)]
        try:
            while any(runner.is_alive() for runner in runners):
                yield _frame(lanes)
                _wait(runners, seconds_between)
        finally:
            turns.cancel()
            for runner in runners:
                runner.join()
        for runner in runners:
            if runner.error is not None:
                raise runner.error
        yield _frame(lanes)

    def prompt_ids(self, prompt: str) -> torch.LongTensor:
        """`(1, T)`: a conversation that begins with a prompt, or the prompt itself if the model does not chat.

        Args:
            prompt (`str`): The prompt.
        """
        if self.tokenizer.chat_template is None:
            ids = self.tokenizer(prompt).input_ids
        else:
            messages = [{"role": "user", "content": prompt}]
            encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            ids = encoded["input_ids"]
        return torch.tensor([ids], device=self.model.device)

    def calls(
        self, settings: RaceSettings, plain: BaseStreamer | None = None, mtp: BaseStreamer | None = None
    ) -> list[Callable[[], torch.LongTensor]]:
        """The call of `generate` of each side.

        Args:
            settings ([`RaceSettings`]): The settings.
            plain, mtp ([`~transformers.generation.streamers.BaseStreamer`], *optional*): What gets the tokens.
        """
        prompt_1T, how = self.prompt_ids(settings.prompt), (settings.temperature, settings.seed)
        shared = {**_inputs(prompt_1T), "max_new_tokens": settings.max_new_tokens}
        of_plain = {**shared, **plain_options(prompt_1T, self.model.base_model.vocab_size, *how), "streamer": plain}
        of_mtp = {**shared, **mtp_options(*how), **_mtp(settings), "streamer": mtp}
        return [lambda: self.base.generate(**of_plain), lambda: self.model.generate(**of_mtp)]

    def _can_be_bitwise(self) -> bool:
        options = {"mtp": True, "mtp_bitwise": True, "mtp_strategy": "linear", "mtp_k": 1}
        try:
            self.model.generate(
                **_inputs(self.prompt_ids(WARM_UP_PROMPT)), **options, do_sample=False, max_new_tokens=2
            )
        except NotImplementedError:
            return False
        return True


class _Runner(threading.Thread):
    """Runs the decoder of a lane in its turns."""

    def __init__(self, lane: Lane, decode: Callable):
        super().__init__(name=f"hf_mtp race {lane.number}", daemon=True)
        self.lane, self.decode, self.error = lane, decode, None
        self.start()

    def run(self) -> None:
        turns, number = self.lane.turns, self.lane.number
        try:
            turns.take(number)
            self.decode()
            self.lane.finish()
        except Cancelled:
            pass
        except Exception as error:
            self.error = error
            turns.cancel()
        finally:
            turns.leave(number)


def _mtp(settings: RaceSettings) -> dict:
    return {
        "mtp": True,
        "mtp_k": settings.k,
        "mtp_strategy": settings.strategy,
        "mtp_bitwise": settings.bitwise,
    }


def _inputs(ids_1T: torch.LongTensor) -> dict:
    return {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}


def _frame(lanes: list[Lane]) -> Frame:
    return Frame(lanes[PLAIN].state, lanes[MTP].state)


def _wait(runners: list[_Runner], seconds: float) -> None:
    """Waits, but not longer than the race lasts."""
    end = time.perf_counter() + seconds
    for runner in runners:
        runner.join(max(0.0, end - time.perf_counter()))
