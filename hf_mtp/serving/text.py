"""Turns the tokens of one response into text as they come, up to the first stop string.

Knows tokens and text. Knows nothing of models, requests or threads.
"""

from tokenizers import Tokenizer

from ..base.token_text import TokenText


class StopStrings:
    """Passes on text up to the first stop string, and holds back what may be the start of one.

    Args:
        strings (`list[str]`): The stop strings. They do not belong to the text.

    Attributes:
        found (`bool`): Whether a stop string was found.
    """

    def __init__(self, strings: list[str]):
        self.strings, self.held, self.found = [string for string in strings if string], "", False

    def feed(self, text: str) -> str:
        """Adds text, and returns what is certain to come before any stop string."""
        self.held += text
        place = first_of(self.held, self.strings)
        if place is not None:
            self.found = True
            return self._take(place, keep=0)
        longest = max((self._overlap(string) for string in self.strings), default=0)
        return self._take(len(self.held) - longest, keep=longest)

    def flush(self) -> str:
        """The text that was held back, once no more comes."""
        return self._take(len(self.held), keep=0)

    def _take(self, end: int, keep: int) -> str:
        taken, self.held = self.held[:end], self.held[len(self.held) - keep :] if keep else ""
        return taken

    def _overlap(self, string: str) -> int:
        """How many characters at the end of the held text start this stop string."""
        lengths = range(min(len(string) - 1, len(self.held)), 0, -1)
        return next((length for length in lengths if self.held.endswith(string[:length])), 0)


def first_of(text: str, strings: list[str]) -> int | None:
    """Where the first of some strings starts in a text; `None` if there is none."""
    return min((place for string in strings if (place := text.find(string)) >= 0), default=None)


class TextStream:
    """The text of one response, token by token.

    Args:
        tokenizer ([`~tokenizers.Tokenizer`]): Decodes; a character of several tokens comes with the last of them.
        stop (`list[str]`): Stop strings. A special token may be one, even if it has no text.
        skip_special_tokens (`bool`): Whether to leave out special tokens.

    Attributes:
        tokens (`int`): Number of tokens up to the end of the text, the one that completes a stop string included.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str], skip_special_tokens: bool = True):
        self.stop, self.tokens = StopStrings(stop), 0
        special = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._stop_tokens = {special[string] for string in stop if string in special and skip_special_tokens}
        self._text = TokenText(tokenizer, skip_special_tokens=skip_special_tokens)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string came, so that no more text follows."""
        return self.stop.found

    def feed(self, tokens: list[int]) -> str:
        """Adds tokens, and returns the new text. Tokens after a stop string are ignored."""
        text = ""
        for token in tokens:
            if self.is_stopped:
                break
            self.tokens += 1
            if token in self._stop_tokens:
                text += self.end()
                self.stop.found = True
                break
            text += self.stop.feed(self._text.step(token))
        return text

    def end(self) -> str:
        """The rest of the text, once no more tokens come."""
        return "" if self.is_stopped else self.stop.feed(self._text.end()) + self.stop.flush()
