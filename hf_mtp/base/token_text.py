"""Turns tokens into text one by one, as they are decoded.

Knows tokens and text. Knows nothing of models, or of where the text goes.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TokenText:
    """The text of tokens that come one by one. A character of several tokens comes with the last of them.

    Together with [`end`], it is the text that the tokenizer makes of all tokens at once, if their bytes are UTF-8. If
    they are not, a tokenizer with byte fallback (Llama, Mistral, Gemma) takes back characters that came before: they
    stay as they came, and the text goes on after them.

    Args:
        tokenizer ([`~tokenizers.Tokenizer`]): Decodes.
        before (`Sequence[int]`, *optional*): Tokens before the first one, on which its text may depend.
        skip_special_tokens (`bool`, *optional*, defaults to `True`): Whether special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), skip_special_tokens: bool = True):
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self._stream = DecodeStream([], skip_special_tokens=skip_special_tokens)
        self._held: list[int] = []  # tokens whose text has not come
        for token in before:
            self.step(token)

    def step(self, token: int) -> str:
        """Adds a token, and returns the new text, which is empty while a character is not complete.

        Args:
            token (`int`): The token.
        """
        self._held.append(token)
        try:
            text = self._stream.step(self.tokenizer, token) or ""
        except Exception as error:  # tokenizers has no class for this error
            if "Invalid prefix" not in str(error):
                raise
            text = self._decoded()
            self._stream = DecodeStream([token], skip_special_tokens=self.skip_special_tokens)
        if text:
            self._held = []
        return text

    def end(self) -> str:
        """The text of the last tokens, if they are bytes that did not become a character."""
        text, self._held = self._decoded(), []
        return text

    def _decoded(self) -> str:
        return self.tokenizer.decode(self._held, skip_special_tokens=self.skip_special_tokens)
