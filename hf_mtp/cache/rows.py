"""Where the tokens of each row of a cache begin and end."""

import torch

from ..layout.attention import padded_right
from .column_attention import ColumnAttention


class Rows:
    """Start, length and position offset of each row, shared by all layers of a cache.

    Args:
        start_B (`torch.LongTensor` of shape `(B,)`): First column of each row that is not padding.
        columns (`int`, *optional*): Fixed size of the storage. If `None`, it grows.

    Attributes:
        hidden_BP (`torch.BoolTensor` of shape `(B, P)`, or `(B, 0)`): Columns after each row's first token that the
            prompt's attention mask hides.
        column_attention ([`ColumnAttention`] or `None`): How the running pass attends, if column by column.
        shares_heads (`bool`): Whether attention in the running pass takes
            [`~hf_mtp.cache.shared_heads.SharedHeads`].
    """

    def __init__(self, start_B: torch.LongTensor, columns: int | None = None):
        self.start_B = start_B
        self.length_B = torch.zeros_like(start_B)
        self.starts = start_B.tolist()  # a copy on the host, so that reading it does not wait for the device
        self.columns = columns
        self.column_attention: ColumnAttention | None = None
        self.shares_heads = False
        self.hidden_BP = torch.zeros(len(start_B), 0, dtype=torch.bool, device=start_B.device)
        self.set_lengths([0] * len(start_B))
        self.set_position_offset(torch.zeros_like(start_B))

    def set_position_offset(self, offset_B: torch.LongTensor) -> None:
        """Sets how far each row's position ids are ahead of a count from 0 at its first token.

        Args:
            offset_B (`torch.LongTensor` of shape `(B,)`, or `(R, B)` for models of R position ids per token).
        """
        self.offset_B, self.largest_offset = offset_B, int(offset_B.max())

    @property
    def positions(self) -> int:
        """The most positions that any row has used."""
        return self.longest + self.largest_offset

    def positions_of(self, place_BN: torch.LongTensor) -> torch.LongTensor:
        """`(B, N)` or `(R, B, N)`: position ids of columns that are counted from each row's first token."""
        return place_BN + self.offset_B[..., None]

    def set_lengths(self, lengths: list[int]) -> None:
        """Sets the number of columns that each row holds."""
        self.lengths, self.longest = lengths, max(lengths)
        self.are_equal = min(lengths) == self.longest

    def next_places(self, new: int) -> torch.LongTensor:
        """`(B, new)`: the columns that a pass over `new` tokens writes, counted from each row's first token."""
        return (self.length_B - self.start_B)[:, None] + torch.arange(new, device=self.length_B.device)

    def add(self, tokens: list[int], tokens_B: torch.LongTensor | None = None) -> None:
        """Adds to the length of each row. `tokens_B` are the same numbers, if already on the device."""
        if tokens_B is None:
            tokens_B = torch.tensor(tokens, device=self.length_B.device)
        self.set_lengths([length + kept for length, kept in zip(self.lengths, tokens, strict=True)])
        self.length_B += tokens_B

    def select(self, rows: list[int], index: torch.LongTensor) -> None:
        """Drops all other rows. `index` are the numbers `rows` on the device."""
        self.starts = [self.starts[row] for row in rows]
        self.set_lengths([self.lengths[row] for row in rows])
        self.start_B, self.length_B = self.start_B[index], self.length_B[index]
        self.offset_B, self.hidden_BP = self.offset_B[..., index], self.hidden_BP[index]

    def append(self, other: "Rows") -> None:
        """Appends the rows of `other`, which has the same number of position ids per token."""
        self.starts = self.starts + other.starts
        self.set_lengths(self.lengths + other.lengths)
        self.start_B = torch.cat([self.start_B, other.start_B])
        self.length_B = torch.cat([self.length_B, other.length_B])
        self.set_position_offset(torch.cat([self.offset_B, other.offset_B], dim=-1))
        columns = max(self.hidden_BP.shape[1], other.hidden_BP.shape[1])
        self.hidden_BP = torch.cat([padded_right(rows.hidden_BP, columns) for rows in (self, other)])
