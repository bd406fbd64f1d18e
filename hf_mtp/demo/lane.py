"""One side of a race: what its decoder has done so far, pass by pass, as a streamer of `generate` learns it.

Knows tokens and text. Knows nothing of models or of how a lane is drawn.
"""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..base.token_text import TokenText
from ..decoding.streaming import DraftStreamer, DraftToken
from .turns import Turns

END = "■"  # stands for a special token, such as the end of the text
CONTEXT = 8  # tokens before a draft on which its text may depend


@dataclass(frozen=True)
class Draft:
    """A draft as it is shown.

    Args:
        text (`str`): Its text.
        place (`int`): Number of tokens after the row's last one, from 1. Alternatives share a place.
        is_accepted (`bool`): Whether the pass that verified it accepted it.
    """

    text: str
    place: int
    is_accepted: bool = False


@dataclass(frozen=True)
class Pass:
    """A forward pass.

    Args:
        tokens (`tuple[str, ...]`): The texts of its new tokens: first the accepted drafts, then one of the base's own.
        drafts (`tuple[Draft, ...]`): The drafts that it verified.
    """

    tokens: tuple[str, ...]
    drafts: tuple[Draft, ...] = ()

    @property
    def accepted(self) -> int:
        """How many of the new tokens were drafts."""
        return sum(draft.is_accepted for draft in self.drafts)


@dataclass(frozen=True)
class LaneState:
    """A lane at one moment.

    Args:
        passes (`tuple[Pass, ...]`): The passes of its decoder so far, the one over the prompt included.
        forward_passes (`int`): Forward passes of the model. Some models need several for one pass of the decoder.
        drafts (`tuple[Draft, ...]`): The drafts that the next pass verifies.
        seconds (`float`): What its clock shows.
        ids (`tuple[int, ...]`): The new tokens.
        is_finished (`bool`): Whether the text is complete.
    """

    passes: tuple[Pass, ...] = ()
    forward_passes: int = 0
    drafts: tuple[Draft, ...] = ()
    seconds: float = 0.0
    ids: tuple[int, ...] = ()
    is_finished: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Speed by its own clock."""
        return len(self.ids) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """New tokens per forward pass; plain decoding has 1."""
        return len(self.ids) / self.forward_passes if self.forward_passes else 0.0

    @property
    def drafted(self) -> int:
        """Drafts that were verified."""
        return sum(len(each.drafts) for each in self.passes)

    @property
    def accepted(self) -> int:
        """Drafts that were accepted."""
        return sum(each.accepted for each in self.passes)


class Lane:
    """Records the passes of one decoder, and takes turns with the others.

    Args:
        number (`int`): Its number among the turns.
        turns ([`Turns`]): The turns.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Turns tokens into text.
        prompt_ids (`list[int]`): The prompt.

    Attributes:
        state ([`LaneState`]): The latest state. Any thread may read it.
    """

    def __init__(self, number: int, turns: Turns, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int]):
        self.number, self.turns, self.state = number, turns, LaneState()
        self.texts, self.prompt_ids = DraftTexts(tokenizer), prompt_ids
        self._text = self.texts.after(prompt_ids[-CONTEXT:])

    def end_pass(
        self, tokens: list[int], forward_passes: int, verified: list[DraftToken], offered: list[DraftToken]
    ) -> None:
        """Records a pass, and lets the others compute.

        Args:
            tokens (`list[int]`): Its new tokens.
            forward_passes (`int`): Forward passes so far.
            verified (`list[DraftToken]`): The drafts that it verified.
            offered (`list[DraftToken]`): The drafts that the next pass verifies.
        """
        seconds, state = self.turns.stop_clock(self.number), self.state
        accepted = accepted_drafts(verified, tokens)
        drafts = tuple(
            Draft(draft.text, draft.place, number in accepted) for number, draft in enumerate(state.drafts, start=1)
        )
        texts = tuple(self.texts.step(self._text, token) for token in tokens)
        ids = (*state.ids, *tokens)
        coming = self.texts.of_drafts([*self.prompt_ids, *ids][-CONTEXT:], offered)
        passes = (*state.passes, Pass(texts, drafts))
        self.state = LaneState(passes, forward_passes, coming, seconds, ids)
        self.turns.end()

    def finish(self) -> None:
        """Records that the text is complete."""
        seconds = self.turns.stop_clock(self.number)
        self.state = replace(self.state, drafts=(), seconds=seconds, is_finished=True)


class PlainStreamer(BaseStreamer):
    """Tells a lane of each token of plain decoding, which is a pass of its own.

    Args:
        lane ([`Lane`]): The lane.
    """

    def __init__(self, lane: Lane):
        self.lane, self._is_prompt = lane, True

    def put(self, value: torch.Tensor) -> None:
        """Takes a token. The first call has the prompt."""
        if not self._is_prompt:
            forward_passes = self.lane.state.forward_passes + 1
            self.lane.end_pass(value.flatten().tolist(), forward_passes, [], [])
        self._is_prompt = False

    def end(self) -> None:
        """Nothing is left."""


class MTPStreamer(DraftStreamer):
    """Tells a lane of each pass of `generate(mtp=True)`.

    Args:
        lane ([`Lane`]): The lane.
    """

    def __init__(self, lane: Lane):
        self.lane, self._is_prompt = lane, True
        self._tokens: list[int] = []
        self._drafts: list[DraftToken] = []

    def put(self, value: torch.Tensor) -> None:
        """Takes a token. The first call has the prompt."""
        if not self._is_prompt:
            self._tokens += value.flatten().tolist()
        self._is_prompt = False

    def end_pass(self) -> None:
        """The drafts for the next pass are still to come."""

    def put_drafts(self, drafts: list[list[DraftToken]], forward_passes: int) -> None:
        """Takes the next drafts, which end the pass."""
        tokens, verified = self._tokens, self._drafts
        self._tokens, self._drafts = [], drafts[0]
        self.lane.end_pass(tokens, forward_passes, verified, drafts[0])

    def end(self) -> None:
        """Nothing is left."""


def accepted_drafts(drafts: list[DraftToken], tokens: list[int]) -> list[int]:
    """The numbers, from 1, of the drafts that equal the new tokens of the pass that verified them.

    Args:
        drafts (`list[DraftToken]`): The drafts.
        tokens (`list[int]`): The new tokens.
    """
    number_of = {(draft.parent, draft.token): number for number, draft in enumerate(drafts, start=1)}
    column, path = 0, []
    for token in tokens:
        if (column, token) not in number_of:
            break
        column = number_of[column, token]
        path.append(column)
    return path


class DraftTexts:
    """Turns tokens into the texts that are shown.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Decodes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.special = tokenizer.backend_tokenizer, set(tokenizer.all_special_ids)

    def after(self, before: list[int]) -> TokenText:
        """The text of tokens that come after others.

        Args:
            before (`list[int]`): The tokens before them.
        """
        return TokenText(self.tokenizer, before)

    def step(self, text: TokenText, token: int) -> str:
        """What a text's next token adds; empty if a character is not complete.

        Args:
            text ([`TokenText`]): The text so far.
            token (`int`): The token.
        """
        return END if token in self.special else text.step(token)

    def of_drafts(self, before: list[int], drafts: list[DraftToken]) -> tuple[Draft, ...]:
        """The texts of drafts, each after its parents.

        Args:
            before (`list[int]`): The last tokens of the text.
            drafts (`list[DraftToken]`): The drafts.
        """
        paths: list[list[int]] = [[]]
        for draft in drafts:
            paths.append([*paths[draft.parent], draft.token])
        return tuple(Draft(self._last(before, path), len(path)) for path in paths[1:])

    def _last(self, before: list[int], path: list[int]) -> str:
        text, last = self.after(before), ""
        for token in path:
            last = self.step(text, token)
        return last
