"""A conversation with one model, whose history stays in the cache from one answer to the next."""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from ..adapter.tuner import GatedLoraTuner
from ..base.caches import cache_name
from ..base.token_text import TokenText
from ..decoding.drafters.acceptance import count_matching
from ..decoding.streaming import PassStreamer

PLAIN_TOKENS = 16  # on which plain decoding's speed is measured


@dataclass(frozen=True)
class Answer:
    """One answer and its speed.

    Args:
        text (`str`): The text.
        tokens (`int`): New tokens.
        forward_passes (`int`): Forward passes, the one over the prompt included.
        seconds (`float`): From the call to the last token.
        accepted (`int`), drafted (`int`): Drafts.
    """

    text: str
    tokens: int
    forward_passes: int
    seconds: float
    accepted: int = 0
    drafted: int = 0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """New tokens per forward pass; plain decoding has 1."""
        return self.tokens / self.forward_passes if self.forward_passes else 0.0

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens in {self.forward_passes} passes ({self.tokens_per_pass:.2f} a pass), "
            f"{self.tokens_per_second:.1f} tokens/s"
        )


class PiecePrinter(PassStreamer):
    """Passes on the text of each pass as one piece.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Decodes.
        show (`Callable[[str], None]`): Takes the pieces.
        in_passes (`bool`): Whether passes may have several tokens. A decode loop that tells where they end does so
            after the first token; if none does, each token is a pass.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None], in_passes: bool):
        self.show, self.in_passes = show, in_passes
        self._text, self._piece, self._is_prompt = TokenText(tokenizer.backend_tokenizer), "", True
        self._tokens, self._has_passes = 0, False

    def put(self, value: torch.Tensor) -> None:
        """Takes new tokens of one row. The first call has the prompt."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self._piece += self._text.step(token)
        self._tokens += 1
        if not self.in_passes or (self._tokens > 1 and not self._has_passes):  # plain decoding, also by `mtp=True`
            self._show()

    def end_pass(self) -> None:
        """Passes on what the pass gave."""
        self._has_passes = True
        self._show()

    def _show(self) -> None:
        if self._piece:
            self.show(self._piece)
            self._piece = ""

    def end(self) -> None:
        """Passes on the rest."""
        self._piece += self._text.end()
        self._show()


class Session:
    """Answers prompts one after the other. The text so far is not read again.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): A base or an upgraded model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        plain (`bool`, *optional*, defaults to `False`): Whether to decode one token per pass.
        strategy (`str`, *optional*, defaults to `"auto"`): As `mtp_strategy` of `generate`.
        system (`str`, *optional*): System prompt of a conversation.
        settings: Further arguments of `generate`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        plain: bool = False,
        strategy: str = "auto",
        system: str | None = None,
        **settings,
    ):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.strategy, self.system = strategy, system
        self.is_upgraded = isinstance(getattr(model, "base_model", None), GatedLoraTuner)
        self.plain = plain or not self.is_upgraded
        self.clear()

    def clear(self) -> None:
        """Forgets the conversation."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self._cache, self._read = None, []

    def say(self, text: str, show: Callable[[str], None]) -> Answer:
        """Answers the user's next message.

        Args:
            text (`str`): The message.
            show (`Callable[[str], None]`): Takes the text of each pass.

        Raises:
            ValueError: The tokenizer has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError("This model's tokenizer has no chat template, so it cannot chat. Use `hf-mtp generate`.")
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = self.complete(ids, show)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer

    def complete(self, ids: list[int], show: Callable[[str], None]) -> Answer:
        """Continues a text.

        Args:
            ids (`list[int]`): Its tokens.
            show (`Callable[[str], None]`): Takes the text of each pass.
        """
        cache = self._cache_for(ids)
        input_ids = torch.tensor([ids], device=self.model.device)
        printer = PiecePrinter(self.tokenizer, show, in_passes=not self.plain)
        start = time.perf_counter()
        mtp = {} if self.plain else {"mtp": True, "mtp_strategy": self.strategy}
        options = {**self.settings, "streamer": printer, **cache, **mtp}
        try:
            output = self.model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)
        except BaseException:  # such as Ctrl-C: plain decoding leaves half an answer in the cache
            self._cache = None
            raise
        seconds, new = time.perf_counter() - start, output[0, len(ids) :]
        self._read = output[0, :-1].tolist()
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        counts = None if self.plain else self.model.mtp_statistics
        if counts is None:
            return Answer(text, len(new), len(new), seconds)
        return Answer(text, len(new), counts.forward_passes, seconds, counts.accepted, counts.drafted)

    def plain_speed(self) -> float:
        """Tokens per second of plain decoding, measured on a few tokens after a warm-up."""
        ids = torch.tensor([self.tokenizer("The").input_ids or [0]], device=self.model.device)
        settings = {"max_new_tokens": PLAIN_TOKENS, "min_new_tokens": PLAIN_TOKENS, "do_sample": False}
        for _ in range(2):
            start = time.perf_counter()
            self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return PLAIN_TOKENS / (time.perf_counter() - start)

    def _cache_for(self, ids: list[int]) -> dict:
        """The cache as an argument of `generate`, with the beginning of the text that it holds."""
        base = self.model.get_base_model() if self.is_upgraded else self.model
        name = cache_name(inspect.signature(base.forward).parameters)
        if not base._supports_default_dynamic_cache():  # a recurrent state cannot be continued by several tokens
            return {}
        # A chat template may write an answer otherwise than the model did, and a token must be left to read.
        surplus = len(self._read) - count_matching(self._read, ids[:-1])
        if self._cache is not None and surplus and all(type(layer) is DynamicLayer for layer in self._cache.layers):
            self._cache.crop(-surplus)
        elif self._cache is None or surplus:
            self._cache = DynamicCache(config=base.config.get_text_config(decoder=True))
        return {name: self._cache}


def sampling(temperature: float | None, top_p: float | None, seed: int | None) -> dict:
    """Settings of `generate`: greedy decoding, unless a temperature above 0 or a `top_p` is given.

    Args:
        temperature, top_p (`float`, *optional*): Those of `generate`.
        seed (`int`, *optional*): Seeds torch's global generator.
    """
    if seed is not None:
        torch.manual_seed(seed)
    if temperature == 0 or temperature is None and top_p is None:
        return {"do_sample": False}
    given = {"temperature": temperature, "top_p": top_p}
    return {"do_sample": True, **{name: value for name, value in given.items() if value is not None}}


def quiet_hosts() -> None:
    """Keeps progress bars and warnings of the host libraries off the terminal."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
