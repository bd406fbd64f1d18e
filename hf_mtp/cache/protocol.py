"""The interface of a cache that the decode loop uses."""

from typing import Protocol

from transformers import Cache

from .rows import Rows


class DecodingCache(Protocol):
    """A cache whose rows keep accepted tokens and roll back the others.

    Attributes:
        rows ([`Rows`]): Where the tokens of each row begin and end.
    """

    rows: Rows

    def gather(self, columns: list[list[int]]) -> None:
        """Moves columns of the last pass to its first ones. Only caches of modes that allow trees can do so."""

    def keep(self, tokens: list[int]) -> None:
        """For each row, keeps the first `tokens` columns of the last pass and rolls the others back."""

    def adopt(self, given: Cache) -> None:
        """Takes over the tokens of the cache that was passed to `generate`."""

    def give_back(self, given: Cache | None) -> Cache | None:
        """Returns the cache for the user: `given`, completed, or the one that the model created."""
