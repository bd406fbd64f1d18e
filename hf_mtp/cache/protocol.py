"""What the decode loop asks of a cache."""

from typing import Protocol

from transformers import Cache

from .rows import Rows


class DecodingCache(Protocol):
    """A cache whose rows grow by what was accepted and forget the rest.

    Attributes:
        rows ([`Rows`]): Where the tokens of each row begin and end.
    """

    rows: Rows

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds."""

    def keep(self, tokens: list[int]) -> None:
        """Keeps so many of the first columns of the last pass, for each row, and rolls all others back."""

    def adopt(self, given: Cache) -> None:
        """Starts with the tokens of the cache that `generate` got."""

    def give_back(self, given: Cache | None) -> Cache | None:
        """Appends to that cache the tokens that it lacks, and returns it, or the one that the model made itself."""
