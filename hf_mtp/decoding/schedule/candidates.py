"""The drafts that a row could verify: what all drafters propose, as one tree."""

from dataclasses import dataclass, field

from ..outcome import Origin


@dataclass
class CandidateTree:
    """A trie of the proposals for one row. Two drafters that propose the same token need one column for it.

    Column 0 is the pending token, and candidates have columns from 1 on, each after its parent.

    Args:
        tokens (`list[int]`): The candidates.
        parents (`list[int]`): The column that each follows.
        rates (`list[float]`): Probability that each is accepted if its parent is.
        origins (`list[Origin]`): Where each comes from.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    _column_of: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, parent: int, token: int, rate: float, origin: Origin) -> int:
        """Adds a candidate after the column `parent`, and returns its column.

        If another drafter proposed the same token, both would have to be wrong, as if they were independent.
        """
        known = self._column_of.get((parent, token))
        if known is not None:
            self.rates[known - 1] = 1 - (1 - self.rates[known - 1]) * (1 - rate)
            return known
        self.tokens.append(token)
        self.parents.append(parent)
        self.rates.append(rate)
        self.origins.append(origin)
        self._column_of[parent, token] = len(self.tokens)
        return len(self.tokens)

    def add_chain(
        self,
        drafter: int,
        tokens: list[int],
        rates: list[float],
        siblings: list[list[int]] | None = None,
        sibling_rates: list[list[float]] | None = None,
    ) -> None:
        """Adds a chain of drafts after the pending token, and the siblings of each.

        Args:
            drafter (`int`): Number of the drafter that proposes them.
            tokens (`list[int]`), rates (`list[float]`): The chain.
            siblings (`list[list[int]]`), sibling_rates (`list[list[float]]`, *optional*): The next likeliest tokens in
                the place of each draft.
        """
        parent = 0
        for place, (token, rate) in enumerate(zip(tokens, rates, strict=False)):
            origin = Origin(drafter, place + 1)
            column = self.add(parent, token, rate, origin)
            if siblings is not None:
                for other, other_rate in zip(siblings[place], sibling_rates[place], strict=False):
                    self.add(parent, other, other_rate, origin)
            parent = column

    def add_tree(self, drafter: int, tokens: list[int], parents: list[int], rates: list[float]) -> None:
        """Adds a tree of drafts after the pending token.

        Args:
            drafter (`int`): Number of the drafter that proposes them.
            tokens (`list[int]`), parents (`list[int]`), rates (`list[float]`): The tree. A parent is 0 for the pending
                token, and i for the i-th draft.
        """
        columns, places = [0], [0]
        for token, parent, rate in zip(tokens, parents, rates, strict=False):
            places.append(places[parent] + 1)
            columns.append(self.add(columns[parent], token, rate, Origin(drafter, places[-1])))

    def best(self, count: int) -> "RankedCandidates":
        """The `count` candidates that decoding reaches most likely, likeliest first, and so after their parents."""
        totals = [0.0] * (len(self.tokens) + 1)
        for parent, rate in zip(self.parents, self.rates, strict=True):
            totals[parent] += rate
        reach = [1.0]
        for parent, rate in zip(self.parents, self.rates, strict=True):
            # Drafters may promise more than 1 together.
            reach.append(reach[parent] * rate / max(1.0, totals[parent]))
        order = sorted(range(1, len(reach)), key=lambda column: -reach[column])[:count]
        number_of = {column: number for number, column in enumerate([0, *order])}
        return RankedCandidates(
            [self.tokens[column - 1] for column in order],
            [number_of[self.parents[column - 1]] for column in order],
            [reach[column] for column in order],
            [self.origins[column - 1] for column in order],
        )


@dataclass(frozen=True)
class RankedCandidates:
    """Candidates of one row, ordered by the probability that decoding reaches them.

    Args:
        tokens, parents, origins: As in [`CandidateTree`], with columns counted in this order.
        reach (`list[float]`): Probability that each and all that it follows are accepted.
    """

    tokens: list[int]
    parents: list[int]
    reach: list[float]
    origins: list[Origin]

    def landing(self, count: int) -> list[float]:
        """The probability that the pending token, or one of the first `count` candidates, is the last accepted."""
        landing = [1.0, *self.reach[:count]]
        for parent, reach in zip(self.parents[:count], self.reach, strict=False):
            landing[parent] -= reach
        return landing

    def rates(self, count: int) -> list[float]:
        """The probability that each of the first `count` is accepted if its parent is."""
        reach = [1.0, *self.reach]
        parents = self.parents[:count]
        return [reach[column] / max(reach[parent], 1e-9) for column, parent in enumerate(parents, start=1)]
