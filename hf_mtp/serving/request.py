"""A request that the engine decodes: from tokenised inputs and a generation config to one row of the decode loop."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..adapter.tuner import GatedLoraTuner
from ..cache.rollback import RollbackCache
from ..decoding.batch import Batch
from ..decoding.checks import refuse_generation_mode, refuse_ids
from ..decoding.noise import PositionNoise, draw_seed
from ..decoding.processors import most_new_tokens
from ..decoding.prompt import Prompt
from ..decoding.sequence import Sequence
from ..decoding.verifier import Verifier
from .rules import Rules
from .text import TextStream


@dataclass
class Row:
    """A row of the decode loop whose prompt has not been read.

    Args:
        sequence ([`Sequence`]): The row.
        rules ([`Rules`]): How its tokens are verified.
        model_kwargs (`dict`): What the base is given with the prompt, such as images, as `generate` prepared it.
        mask_length (`int`, *optional*): Length of an attention mask of ones, if `generate` left it out.
    """

    sequence: Sequence
    rules: Rules
    model_kwargs: dict
    mask_length: int | None

    def read_by(self, model: PreTrainedModel) -> Batch:
        """A batch of this row alone. Of a prompt with images, the base has read all but the last token.

        Args:
            model ([`~transformers.PreTrainedModel`]): The base.
        """
        prompt = Prompt.of(model, self.sequence.ids_1S, self.model_kwargs, self.mask_length)
        self.model_kwargs = {}  # images may be large
        cache = RollbackCache(prompt.start_B)
        prompt.fill(cache)
        return Batch([self.sequence], cache, prompt.unread_BT)


@dataclass(eq=False)
class Request:
    """A request and what became of it.

    Args:
        row ([`Row`]): What to decode.
        text ([`TextStream`]): Its text so far.
        on_text (`Callable[[str], None]` or `None`): Takes the new text of each pass, if it is streamed. Called in the
            engine's thread.
        on_end (`Callable[[Exception | None], None]`): Called once, with the error if there was one.
        arrived, started (`float`): When it came and when its prompt was read, by `time.perf_counter`.
        passes (`int`): Forward passes so far.
        is_cancelled (`bool`): Set by any thread; the row then leaves the batch before the next pass.
    """

    row: Row
    text: TextStream
    on_text: Callable[[str], None] | None
    on_end: Callable[[Exception | None], None]
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    passes: int = 0
    is_cancelled: bool = False

    @property
    def sequence(self) -> Sequence:
        """Its row of the batch."""
        return self.row.sequence

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return self.sequence.prompt

    @property
    def new_ids(self) -> list[int]:
        """The new tokens, up to the end of the text."""
        start = self.sequence.prompt
        return self.sequence.ids_S[start : start + self.text.tokens].tolist()

    def receive(self, tokens: list[int]) -> None:
        """Takes the new tokens of a pass, and finishes the row after a stop string."""
        self.passes += 1
        text = self.text.feed(tokens)
        if self.text.is_stopped:
            self.sequence.finish()
        if self.sequence.is_finished:
            text += self.text.end()
        if text and self.on_text is not None:
            self.on_text(text)


@torch.no_grad()
def row_of(tuner: GatedLoraTuner, inputs: dict, config: GenerationConfig, seed: int | None, number: int = 0) -> Row:
    """Makes a row of what `generate` would decode. transformers prepares its processors and criteria.

    Args:
        tuner ([`GatedLoraTuner`]): The upgraded model.
        inputs (`dict`): `input_ids`, `attention_mask` and other inputs of one prompt, without padding.
        config ([`~transformers.GenerationConfig`]): The settings, `max_new_tokens` among them.
        seed (`int`, *optional*): Seed of sampling; a random one if `None`.
        number (`int`, *optional*, defaults to 0): Which of several responses to one prompt. It gets the text that
            `generate(num_return_sequences=n)` returns in this row.

    Raises:
        ValueError: The settings select beam search or another mode that is not exact, or are not valid.
    """
    prepared: dict = {}

    def capture(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        prepared.update(processors=logits_processor, criteria=stopping_criteria, config=generation_config)
        prepared["inputs"] = model_kwargs
        return input_ids

    config = copy.copy(config)
    config.use_cache = True  # some models' default is False
    tuner.model.generate(**inputs, generation_config=config, custom_generate=capture)
    config, processors, criteria = prepared["config"], prepared["processors"], prepared["criteria"]
    ids_S = inputs["input_ids"][0]
    refuse_generation_mode(config)
    refuse_ids(ids_S, tuner.vocab_size)
    noise = None
    if config.do_sample:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        noise = PositionNoise(draw_seed(generator), number, tuner.vocab_size, ids_S.device)
    pad_token = getattr(config, "_pad_token_tensor", None)
    verifier = Verifier(processors, criteria, 1, 0 if pad_token is None else int(pad_token))
    sequence = Sequence(ids_S, number, 0, most_new_tokens(criteria, len(ids_S)), config, processors, noise)
    mask_length = getattr(config, "_mask_length", None)
    return Row(sequence, Rules.of(verifier, noise is not None), prepared["inputs"], mask_length)
