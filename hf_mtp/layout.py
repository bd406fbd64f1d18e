"""Where mask blocks hang: which token each mask stands for, at which position, and what it may attend to.

Pure functions of integer tensors, the same for training and for decoding. Knows nothing of models, losses or configs.

A forward pass has N columns: regular tokens first, then A blocks of k masks. Block a hangs on the regular token in
column `anchor[a]`; its i-th mask (i = 1..k) stands for the token i columns after the anchor, has the position of that
token and predicts the one after it:

    columns   x1 x2 x3 x4 | m1 m2 (after x2) | m1 m2 (after x4)
    positions  0  1  2  3 |  2  3            |  4  5
    predicts  x2 x3 x4 x5 | x4 x5            | x6 x7

Shapes: B batch, T regular columns, A blocks (anchors) per row, k masks per block, M = A * k, N = T + M.
"""

from dataclasses import dataclass

import torch

IGNORE = -100  # the label of a token outside the loss, as everywhere in PyTorch and transformers


@dataclass(frozen=True)
class BlockLayout:
    """A batch's mask blocks.

    Args:
        anchor_BA (`torch.LongTensor` of shape `(B, A)`): Regular column that each block hangs on.
        position_BT (`torch.LongTensor` of shape `(B, T)`): Positions of the regular tokens.
        segment_BT (`torch.LongTensor` of shape `(B, T)`): Document of each regular token, -1 for padding.
        k (`int`): Masks per block.
    """

    anchor_BA: torch.LongTensor
    position_BT: torch.LongTensor
    segment_BT: torch.LongTensor
    k: int

    @property
    def step_M(self) -> torch.LongTensor:
        """`(M,)`: how many columns after its anchor is the token that each mask stands for, 1..k."""
        anchors = self.anchor_BA.shape[1]
        return torch.arange(1, self.k + 1, device=self.anchor_BA.device).repeat(anchors)

    @property
    def index_BM(self) -> torch.LongTensor:
        """`(B, M)`: which mask token, 0..k-1, stands in each mask column."""
        return (self.step_M - 1).expand(self.anchor_BA.shape[0], -1)

    @property
    def anchor_BM(self) -> torch.LongTensor:
        """`(B, M)`: the regular column that each mask's block hangs on."""
        return self.anchor_BA.repeat_interleave(self.k, dim=1)

    @property
    def stands_for_BM(self) -> torch.LongTensor:
        """`(B, M)`: the regular column of the token that each mask stands for; T or more past the end."""
        return self.anchor_BM + self.step_M

    @property
    def position_BN(self) -> torch.LongTensor:
        """`(B, N)`: position ids of all columns."""
        position_BM = self.position_BT.gather(1, self.anchor_BM) + self.step_M
        return torch.cat([self.position_BT, position_BM], dim=1)

    @property
    def segment_BN(self) -> torch.LongTensor:
        """`(B, N)`: documents of all columns, a mask's being its anchor's."""
        return torch.cat([self.segment_BT, self.segment_BT.gather(1, self.anchor_BM)], dim=1)

    @property
    def reach_BN(self) -> torch.LongTensor:
        """`(B, N)`: the last regular column that each column may attend to: itself, or its anchor."""
        column_BT = torch.arange(self.position_BT.shape[1], device=self.anchor_BA.device).expand_as(self.position_BT)
        return torch.cat([column_BT, self.anchor_BM], dim=1)

    @property
    def block_N(self) -> torch.LongTensor:
        """`(N,)`: the block of each column, -1 for regular tokens."""
        anchors, device = self.anchor_BA.shape[1], self.anchor_BA.device
        block_M = torch.arange(anchors, device=device).repeat_interleave(self.k)
        return torch.cat([torch.full((self.position_BT.shape[1],), -1, device=device), block_M])

    def split_rows(self, blocks: int) -> "BlockLayout":
        """The same blocks with at most `blocks` to a row, each row repeated as often as that takes.

        Returns:
            [`BlockLayout`] of `B * ceil(A / blocks)` rows; the last row of each input row is filled up with its last
            block.
        """
        batch, anchors = self.anchor_BA.shape
        parts = -(-anchors // blocks)
        filled = torch.cat([self.anchor_BA, self.anchor_BA[:, -1:].expand(-1, parts * blocks - anchors)], dim=1)
        return BlockLayout(
            filled.reshape(batch * parts, blocks),
            self.position_BT.repeat_interleave(parts, dim=0),
            self.segment_BT.repeat_interleave(parts, dim=0),
            self.k,
        )

    def target_columns(self, labels_BT: torch.LongTensor) -> torch.LongTensor:
        """The regular column of the token that each mask is to predict.

        Args:
            labels_BT (`torch.LongTensor` of shape `(B, T)`): Labels, aligned with the tokens (not shifted).

        Returns:
            `torch.LongTensor` of shape `(B, M)`, -100 where the mask has nothing to predict: past the end of the row
            or of the document, outside the loss, or in a block whose anchor is outside the loss.
        """
        length = labels_BT.shape[1]
        column_BM = self.stands_for_BM + 1
        inside_BM = column_BM < length
        column_BM = column_BM.clamp(max=length - 1)
        in_loss_BT = (labels_BT != IGNORE) & (self.segment_BT >= 0)
        same_document_BM = self.segment_BT.gather(1, column_BM) == self.segment_BT.gather(1, self.anchor_BM)
        supervised_BM = in_loss_BT.gather(1, column_BM) & in_loss_BT.gather(1, self.anchor_BM)
        return torch.where(inside_BM & same_document_BM & supervised_BM, column_BM, IGNORE)


def segments(attention_mask_BT: torch.Tensor | None, position_BT: torch.LongTensor) -> torch.LongTensor:
    """Document of each token: a new one starts wherever the position does not grow by one, as in a packed row.

    Args:
        attention_mask_BT (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding.
        position_BT (`torch.LongTensor` of shape `(B, T)`): Position ids.

    Returns:
        `torch.LongTensor` of shape `(B, T)`: 0, 1, ... per row, -1 at padding.
    """
    starts_BT = torch.diff(position_BT, dim=1, prepend=position_BT[:, :1] - 1) != 1
    segment_BT = starts_BT.long().cumsum(dim=1)
    return segment_BT if attention_mask_BT is None else segment_BT.masked_fill(attention_mask_BT == 0, -1)


def training_layout(
    labels_BT: torch.LongTensor,
    position_BT: torch.LongTensor,
    segment_BT: torch.LongTensor,
    k: int,
    anchors_per_row: int | None = None,
    generator: torch.Generator | None = None,
) -> BlockLayout:
    """Hangs a block on regular tokens inside the loss: on all of them, or on a random sample per row.

    Args:
        labels_BT (`torch.LongTensor` of shape `(B, T)`): Labels, -100 outside the loss (the prompt, padding).
        position_BT (`torch.LongTensor` of shape `(B, T)`): Position ids.
        segment_BT (`torch.LongTensor` of shape `(B, T)`): Documents, see [`segments`].
        k (`int`): Masks per block.
        anchors_per_row (`int`, *optional*): Blocks per row at most, drawn without replacement. All if `None`.
        generator (`torch.Generator`, *optional*): Source of the draw.

    Returns:
        [`BlockLayout`] with as many blocks per row as the row that needs most; rows that need fewer get blocks on
        other tokens, whose first mask has no target. No block at all if no first mask of the batch has a target.
    """
    # An anchor is worth a block if its first mask has something to predict: the token two columns on.
    useful_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    useful_BT[:, :-2] = (
        (labels_BT[:, :-2] != IGNORE)
        & (labels_BT[:, 2:] != IGNORE)
        & (segment_BT[:, :-2] == segment_BT[:, 2:])
        & (segment_BT[:, :-2] >= 0)
    )
    anchors = int(useful_BT.sum(dim=1).max())
    if anchors_per_row is not None:
        anchors = min(anchors, anchors_per_row)
    score_BT = torch.rand(labels_BT.shape, generator=generator, device=labels_BT.device)
    anchor_BA = score_BT.masked_fill(~useful_BT, -1.0).topk(anchors, dim=1).indices
    return BlockLayout(anchor_BA.sort(dim=1).values, position_BT, segment_BT, k)


def decoding_layout(regular: int, past: int, anchors: int, k: int, device: torch.device) -> BlockLayout:
    """Hangs blocks on the last `anchors` of the `regular` tokens of one decoding step (batch 1).

    Args:
        regular (`int`): T, regular tokens of this step: a prompt, or the pending token and the drafts to verify.
        past (`int`): Tokens in the cache, all regular.
        anchors (`int`): A, 1 for linear decoding, `regular` for quadratic.
        k (`int`): Masks per block; may be 0.
        device (`torch.device`): Where the tensors go.
    """
    column = torch.arange(regular, device=device)[None]
    return BlockLayout(column[:, regular - anchors :], past + column, torch.zeros_like(column), k)
