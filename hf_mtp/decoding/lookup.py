"""Lookup: what followed the last time that a row's latest tokens stood in it.

Prompt lookup decoding (Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding): where a text repeats its prompt
or itself, drafts are there for nothing. Knows token ids, no tensors, and one row at a time.
"""

from dataclasses import dataclass

LONGEST_INDEXED = 3  # tokens by which places are found
LONGEST_MATCH = 8  # tokens that are compared there; a longer match tells nothing more


@dataclass(frozen=True)
class Match:
    """A place in a row's own text that reads like its end.

    Args:
        length (`int`): Tokens before the place that agree with the row's last ones, at most [`LONGEST_MATCH`]; 0 if
            there is no such place.
        tokens (`list[int]`): What followed there.
    """

    length: int
    tokens: list[int]


class Lookup:
    """An index of one row's text that grows with it.

    Args:
        tokens (`list[int]`): The text so far.
    """

    def __init__(self, tokens: list[int]):
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # the latest place that follows these tokens
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        """Adds the next tokens."""
        for token in tokens:
            place = len(self.tokens)
            for length in range(1, min(LONGEST_INDEXED, place) + 1):
                self.after[tuple(self.tokens[place - length :])] = place
            self.tokens.append(token)

    def match(self, count: int) -> Match:
        """The latest place that reads most like the end of the text, and up to `count` tokens of what followed.

        Where the text runs out, it goes on with what was found: a loop is followed around.
        """
        end = len(self.tokens)
        for length in range(min(LONGEST_INDEXED, end), 0, -1):
            place = self.after.get(tuple(self.tokens[end - length :]))
            if place is not None:
                break
        else:
            return Match(0, [])
        while length < min(LONGEST_MATCH, place) and self.tokens[place - length - 1] == self.tokens[end - length - 1]:
            length += 1
        found: list[int] = []
        for source in range(place, place + count):
            found.append(self.tokens[source] if source < end else found[source - end])
        return Match(length, found)
