"""Blocks of masks: the token that each mask stands for, its position, and what it may attend to.

Pure functions of integer tensors, the same for training and for decoding. Knows nothing of models, losses or configs.

A forward pass has N columns: regular tokens first, then A blocks of k masks. The anchor of block a is the regular
token in column `anchor[a]`. Its i-th mask (i = 1..k) stands for the token i columns after the anchor, has the position
of that token and predicts the next one:

    columns   x1 x2 x3 x4 | m1 m2 (after x2) | m1 m2 (after x4)
    positions  0  1  2  3 |  2  3            |  4  5
    predicts  x2 x3 x4 x5 | x4 x5            | x6 x7

In training every block has k masks. In decoding only the masks that are likely to be useful exist.

Shapes: B batch, T regular columns, A blocks (anchors) per row, k masks per block, M masks per row, N = T + M.
"""

from dataclasses import dataclass, replace

import torch

from .mask_plan import MaskPlan
from .tree import ancestors, depths

IGNORE = -100  # the label of a token outside the loss, as everywhere in PyTorch and transformers
NO_DOCUMENT = -1  # the document of padding, and of masks that only fill up a row


@dataclass(frozen=True)
class BlockLayout:
    """A batch's mask blocks.

    Args:
        position_BT (`torch.LongTensor` of shape `(B, T)`): Positions of the regular tokens.
        segment_BT (`torch.LongTensor` of shape `(B, T)`): Document of each regular token, -1 for padding.
        anchor_BM (`torch.LongTensor` of shape `(B, M)`): Regular column of the anchor of each mask's block. The masks
            of a block are adjacent.
        step_BM (`torch.LongTensor` of shape `(B, M)`): Index of each mask in its block, 1..k: it stands for the token
            that many columns after the anchor.
        alive_BM (`torch.BoolTensor` of shape `(B, M)`, *optional*): False for masks that only fill up a row.
        is_chain (`bool`): Whether all masks form one block after the last regular token: a plain causal sequence.
        weight_B (`torch.Tensor` of shape `(B,)`, *optional*): If the blocks are a sample, the number of blocks that
            each block of a row represents.
        ancestor_BTT (`torch.BoolTensor` of shape `(B, T, T)`, *optional*): For a tree of drafts, whether the second
            regular column is the first one or one that it follows. If `None`, every token follows all before it.
    """

    position_BT: torch.LongTensor
    segment_BT: torch.LongTensor
    anchor_BM: torch.LongTensor
    step_BM: torch.LongTensor
    alive_BM: torch.BoolTensor | None = None
    is_chain: bool = False
    weight_B: torch.Tensor | None = None
    ancestor_BTT: torch.BoolTensor | None = None

    @classmethod
    def of_blocks(
        cls, anchor_BA: torch.LongTensor, position_BT: torch.LongTensor, segment_BT: torch.LongTensor, k: int
    ) -> "BlockLayout":
        """A whole block of k masks for each of the anchors `anchor_BA`, regular columns of shape `(B, A)`."""
        step_M = torch.arange(1, k + 1, device=anchor_BA.device).repeat(anchor_BA.shape[1])
        return cls(position_BT, segment_BT, anchor_BA.repeat_interleave(k, dim=1), step_M.expand(len(anchor_BA), -1))

    @property
    def masks(self) -> int:
        """M, masks per row."""
        return self.anchor_BM.shape[1]

    @property
    def is_causal(self) -> bool:
        """Whether the columns are one plain causal sequence."""
        return self.ancestor_BTT is None and (not self.masks or self.is_chain)

    @property
    def index_BM(self) -> torch.LongTensor:
        """`(B, M)`: the mask token, 0..k-1, in each mask column."""
        return self.step_BM - 1

    @property
    def stands_for_BM(self) -> torch.LongTensor:
        """`(B, M)`: the regular column of the token that each mask stands for; T or more past the end."""
        return self.anchor_BM + self.step_BM

    @property
    def position_BN(self) -> torch.LongTensor:
        """`(B, N)`: position ids of all columns."""
        if not self.masks:
            return self.position_BT
        position_BM = self.position_BT.gather(1, self.anchor_BM) + self.step_BM
        return torch.cat([self.position_BT, position_BM], dim=1)

    @property
    def segment_BN(self) -> torch.LongTensor:
        """`(B, N)`: documents of all columns. A mask belongs to its anchor's document."""
        segment_BM = self.segment_BT.gather(1, self.anchor_BM)
        if self.alive_BM is not None:
            segment_BM = segment_BM.masked_fill(~self.alive_BM, NO_DOCUMENT)
        return torch.cat([self.segment_BT, segment_BM], dim=1)

    @property
    def reach_BN(self) -> torch.LongTensor:
        """`(B, N)`: the last regular column that each column may attend to: itself, or its anchor."""
        column_BT = torch.arange(self.position_BT.shape[1], device=self.position_BT.device).expand_as(self.position_BT)
        return torch.cat([column_BT, self.anchor_BM], dim=1)

    @property
    def block_BN(self) -> torch.LongTensor:
        """`(B, N)`: the block of each column, named by its anchor; -1 for regular tokens."""
        return torch.cat([torch.full_like(self.position_BT, -1), self.anchor_BM], dim=1)

    def without_masks(self) -> "BlockLayout":
        """The regular tokens alone."""
        return replace(self, anchor_BM=self.anchor_BM[:, :0], step_BM=self.step_BM[:, :0])

    def chunks(self, masks: int) -> list["BlockLayout"]:
        """Splits the layout into chunks of at most `masks` masks per row. `masks` is a multiple of k."""
        return [
            replace(self, anchor_BM=anchor_BM, step_BM=step_BM)
            for anchor_BM, step_BM in zip(
                self.anchor_BM.split(masks, dim=1), self.step_BM.split(masks, dim=1), strict=True
            )
        ]

    def target_columns(self, labels_BT: torch.LongTensor) -> torch.LongTensor:
        """The regular column of the token that each mask is to predict.

        Args:
            labels_BT (`torch.LongTensor` of shape `(B, T)`): Labels, aligned with the tokens (not shifted).

        Returns:
            `torch.LongTensor` of shape `(B, M)`. It is -100 for masks without a target: past the end of the row or of
            the document, outside the loss, or in a block whose first mask has no target.
        """
        length, column_BM = labels_BT.shape[1], self.stands_for_BM + 1
        inside_BM = column_BM.clamp(max=length - 1)
        same_document_BM = self.segment_BT.gather(1, inside_BM) == self.segment_BT.gather(1, self.anchor_BM)
        in_loss_BM = (column_BM < length) & (labels_BT.gather(1, inside_BM) != IGNORE)
        is_useful_BM = useful_anchors(labels_BT, self.segment_BT).gather(1, self.anchor_BM)
        return torch.where(is_useful_BM & same_document_BM & in_loss_BM, column_BM, IGNORE)


def segments(attention_mask_BT: torch.Tensor | None, position_BT: torch.LongTensor) -> torch.LongTensor:
    """Document of each token. As in packed rows, a new one starts wherever the position does not increase by one.

    Args:
        attention_mask_BT (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding.
        position_BT (`torch.LongTensor` of shape `(B, T)`): Position ids.

    Returns:
        `torch.LongTensor` of shape `(B, T)`: 0, 1, ... per row, -1 at padding.
    """
    starts_BT = torch.diff(position_BT, dim=1, prepend=position_BT[:, :1] - 1) != 1
    segment_BT = starts_BT.long().cumsum(dim=1)
    return segment_BT if attention_mask_BT is None else segment_BT.masked_fill(attention_mask_BT == 0, NO_DOCUMENT)


def useful_anchors(labels_BT: torch.LongTensor, segment_BT: torch.LongTensor) -> torch.BoolTensor:
    """Tokens that are useful anchors: the next two tokens are inside the loss, and the first mask predicts the second.

    Args:
        labels_BT (`torch.LongTensor` of shape `(B, T)`): Labels, -100 outside the loss.
        segment_BT (`torch.LongTensor` of shape `(B, T)`): Documents, see [`segments`].

    Returns:
        `torch.BoolTensor` of shape `(B, T)`.
    """
    useful_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    in_loss_BT = labels_BT != IGNORE
    same_document = (segment_BT[:, :-2] == segment_BT[:, 2:]) & (segment_BT[:, :-2] > NO_DOCUMENT)
    useful_BT[:, :-2] = in_loss_BT[:, 1:-1] & in_loss_BT[:, 2:] & same_document
    return useful_BT


@torch.compiler.disable  # sizes vary from batch to batch
def training_layout(
    labels_BT: torch.LongTensor,
    position_BT: torch.LongTensor,
    segment_BT: torch.LongTensor,
    k: int,
    anchors_per_row: int | None = None,
    generator: torch.Generator | None = None,
    same_in_all_rows: bool = False,
) -> BlockLayout:
    """Adds a block to every token whose next token is inside the loss, or to a random sample of these tokens per row.

    These include the last token of a prompt, which has the first block in decoding.

    Args:
        labels_BT (`torch.LongTensor` of shape `(B, T)`): Labels, -100 outside the loss (the prompt, padding).
        position_BT (`torch.LongTensor` of shape `(B, T)`): Position ids.
        segment_BT (`torch.LongTensor` of shape `(B, T)`): Documents, see [`segments`].
        k (`int`): Masks per block.
        anchors_per_row (`int`, *optional*): Maximum number of blocks per row, sampled without replacement; all if
            `None`.
        generator (`torch.Generator`, *optional*): Generator for the draw.
        same_in_all_rows (`bool`, *optional*, defaults to `False`): Whether all rows have blocks on the same columns.

    Returns:
        [`BlockLayout`] in which all rows have as many blocks as the row with most. Rows that need fewer get blocks on
        other tokens, whose masks have no target. There is no block if no mask of the batch has a target.
    """
    useful_BT = useful_anchors(labels_BT, segment_BT)
    if same_in_all_rows:
        useful_BT = useful_BT.any(dim=0, keepdim=True)
    useful_B = useful_BT.sum(dim=1)
    anchors, weight_B = int(useful_B.max()), None
    if anchors_per_row is not None and anchors > anchors_per_row:
        anchors, weight_B = anchors_per_row, (useful_B / anchors_per_row).clamp(min=1.0).expand(len(labels_BT))
    score_BT = useful_BT.float()
    if weight_B is not None:
        score_BT *= 1 + torch.rand(useful_BT.shape, generator=generator, device=labels_BT.device)
    anchor_BA = score_BT.topk(anchors, dim=1).indices.sort(dim=1).values
    layout = BlockLayout.of_blocks(anchor_BA.expand(len(labels_BT), -1), position_BT, segment_BT, k)
    return replace(layout, weight_B=weight_B)


@torch.compiler.disable
def weight_of_all_masks(
    labels_BT: torch.LongTensor, segment_BT: torch.LongTensor, k: int, decay: float
) -> torch.Tensor:
    """The divisor of a batch's losses, which does not depend on the sample of blocks that is computed.

    Args:
        labels_BT, segment_BT, k: As in [`training_layout`].
        decay (`float`): Weight of each mask of a block relative to the one before it.

    Returns:
        `torch.Tensor`, a scalar: the sum of the weights of all masks with a target, with a block on every token.
    """
    useful_BT, in_loss_BT = useful_anchors(labels_BT, segment_BT), labels_BT != IGNORE
    weight, length = torch.zeros((), device=labels_BT.device), labels_BT.shape[1]
    for ahead in range(2, min(k + 2, length)):  # columns from an anchor to the target of a mask
        same_document = segment_BT[:, : length - ahead] == segment_BT[:, ahead:]
        targets = useful_BT[:, : length - ahead] & same_document & in_loss_BT[:, ahead:]
        weight += decay ** (ahead - 2) * targets.sum()
    return weight


def decoding_layout(
    position_BT: torch.LongTensor, plan: MaskPlan, first: int = 0, parent_BK: torch.LongTensor | None = None
) -> BlockLayout:
    """The columns of one decoding step.

    Args:
        position_BT (`torch.LongTensor` of shape `(B, T)`): Positions of the step's regular tokens if these are a plain
            sequence, below 0 at padding.
        plan ([`MaskPlan`]): The masks.
        first (`int`, *optional*, defaults to 0): The regular column that has index 0 in the plan.
        parent_BK (`torch.LongTensor` of shape `(B, T - 1)`, *optional*): The column of each draft's parent, if the
            drafts are a tree. The pending token is then the first regular column.
    """
    segment_BT = torch.where(position_BT < 0, NO_DOCUMENT, 0)
    ancestor_BTT = None
    if parent_BK is not None:
        ancestor_BTT = ancestors(parent_BK)
        position_BT = position_BT[:, :1] + depths(ancestor_BTT)
    return BlockLayout(
        position_BT.clamp(min=0),
        segment_BT,
        plan.anchor_BM + first,
        plan.step_BM,
        plan.alive_BM,
        plan.is_chain,
        ancestor_BTT=ancestor_BTT,
    )
