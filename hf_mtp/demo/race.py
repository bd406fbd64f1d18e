"""Races plain decoding against `generate(mtp=True)` on one prompt, in turns.

Plain decoding runs the base's own `generate` on a copy of its modules that shares the weights and has no adapter. One
thread computes everything that the model computes: the reason is in `turns.py`.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..decoding.drafters.acceptance import count_matching
from ..decoding.statistics import MTPGenerateOutput
from ..evaluation.compare import same_weights
from ..passes.decoding_pass import DecodingPass
from .lane import Lane, LaneState, MTPStreamer, PlainStreamer
from .plain_sampling import mtp_options, plain_options
from .settings import SLOW_PAUSE, RaceSettings, refuse_unless_fits
from .turns import Turns

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
        return count_matching(self.plain.ids, self.mtp.ids)

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
        self._computer = ThreadPoolExecutor(1, "hf_mtp race")
        self._known: set[tuple] = set()
        self._busy = threading.Lock()  # while a race runs
        self._turns, self._ended = Turns(0), threading.Event()  # of the latest race
        self._ended.set()
        self.context: int = self.compute(lambda: DecodingPass(model.base_model).positions_left(0))
        self.can_be_bitwise: bool = self.compute(self._can_be_bitwise)

    def compute(self, call: Callable):
        """What a call returns, in the thread that computes everything here.

        Args:
            call (`Callable`): A function without arguments.
        """
        return self._computer.submit(call).result()

    def stop(self) -> None:
        """Ends a race after the current pass. Any thread may call this."""
        self._turns.cancel()

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
        if key not in self._known:
            self.compute(lambda: self._warm_up(settings))
            self._known.add(key)

    def _warm_up(self, settings: RaceSettings) -> None:
        ids_1T = self.prompt_ids(WARM_UP_PROMPT)
        self.base.generate(**_inputs(ids_1T), do_sample=False, max_new_tokens=2)
        options = {"do_sample": False, "max_new_tokens": WARM_UP_TOKENS, "return_dict_in_generate": True}
        output = self.model.generate(**_inputs(ids_1T), **_mtp(settings), **options)
        if not isinstance(output, MTPGenerateOutput):
            raise ValueError(
                "This model only supports plain decoding, one token per pass, so there is nothing to race."
            )

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
            self._turns, ended = turns, threading.Event()
            self._ended = ended
            race = self._computer.submit(self._race, settings, turns, lanes)
            try:
                yield from _frames(race, lanes, seconds_between)
            finally:
                turns.cancel()
                wait([race])
                ended.set()
            race.result()  # raises what it raised
            yield _frame(lanes)

    @torch.no_grad()  # `generate` would switch gradients on again for the other side when it ends
    def _race(self, settings: RaceSettings, turns: Turns, lanes: list[Lane]) -> None:
        """Decodes both sides in turns."""
        calls = self.calls(settings, PlainStreamer(lanes[PLAIN]), MTPStreamer(lanes[MTP]))
        turns.run([_decoder(lane, call) for lane, call in zip(lanes, calls, strict=True)])

    @property
    def is_racing(self) -> bool:
        """Whether a race runs."""
        return self._busy.locked()

    def wait_until_ended(self, timeout: float = 10.0) -> None:
        """Waits until the race that runs now has ended, but not longer than a number of seconds. The next one may run.

        Args:
            timeout (`float`, *optional*, defaults to 10): That number.
        """
        self._ended.wait(timeout)

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


def _decoder(lane: Lane, call: Callable) -> Callable[[], None]:
    """A call of `generate` that tells its lane of the end."""

    def decode() -> None:
        call()
        lane.finish()

    return decode


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


def _frames(race: Future, lanes: list[Lane], seconds_between: float) -> Iterator[Frame]:
    """Frames while a race runs."""
    while not race.done():
        yield _frame(lanes)
        wait([race], seconds_between)
