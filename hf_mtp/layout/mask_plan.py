"""Mask plan: which masks the next forward pass computes.

A block of up to k masks can follow each of R regular tokens, its anchor. The i-th mask of a block is useful if the
anchor is the last accepted token and the drafts of the i - 1 masks before it are accepted too. A budget of M masks
goes to the most useful of all R * k. With M = R * k this is quadratic decoding, and with one block on the last token
it is linear decoding (Samragh et al., arXiv 2507.11851). Budgeted quadratic decoding follows github.com/mandt-lab/ptp.

Pure functions of tensors. Shapes: B batch, K drafts, R = K + 1 regular tokens, k masks per block, M masks per row.
"""

from dataclasses import dataclass, replace

import torch

from .tree import ancestors


@dataclass(frozen=True)
class MaskPlan:
    """The masks of one forward pass.

    Args:
        anchor_BM (`torch.LongTensor` of shape `(B, M)`): The anchor of each mask, a regular token 0..R-1.
        step_BM (`torch.LongTensor` of shape `(B, M)`): Index of each mask in its block, 1..k.
        alive_BM (`torch.BoolTensor` of shape `(B, M)`): False for masks that only fill up a row.
        column_BRk (`torch.LongTensor` of shape `(B, R, k)`): Place of each mask of each block among the M, -1 if
            absent.
        is_chain (`bool`): Whether the masks of every row form one block after the last regular token.
    """

    anchor_BM: torch.LongTensor
    step_BM: torch.LongTensor
    alive_BM: torch.BoolTensor
    column_BRk: torch.LongTensor
    is_chain: bool = False

    @property
    def masks(self) -> int:
        """M."""
        return self.anchor_BM.shape[1]

    @property
    def drafts_BR(self) -> torch.LongTensor:
        """`(B, R)`: the number of masks in the block of each regular token."""
        return (self.column_BRk >= 0).sum(dim=2)


def no_masks(batch: int, regular: int, k: int, device: torch.device) -> MaskPlan:
    """The empty plan for `regular` tokens per row."""
    none = torch.empty(batch, 0, dtype=torch.long, device=device)
    return MaskPlan(none, none, none.bool(), none.new_full((batch, regular, k), -1))


def whole_blocks(drafts_B: torch.LongTensor, count: int, k: int, linear: bool) -> MaskPlan:
    """Whole blocks of k masks: after every regular token of a row (quadratic decoding), or after its last one
    (linear).

    Args:
        drafts_B (`torch.LongTensor` of shape `(B,)`): Drafts of each row.
        count (`int`): K, the largest number of drafts, to which all rows are padded.
        k (`int`): Masks per block; may be 0.
        linear (`bool`): Whether only the last token has a block.
    """
    anchor_R = torch.arange(count + 1, device=drafts_B.device)
    wanted_BR = anchor_R == drafts_B[:, None] if linear else anchor_R <= drafts_B[:, None]
    value_BRk = wanted_BR[:, :, None].float().expand(-1, -1, k)
    plan = choose_masks(value_BRk, k if linear else (count + 1) * k)
    # In a batch, rows with fewer drafts have their block on an earlier column than the last.
    return replace(plan, is_chain=plan.is_chain or (linear and len(drafts_B) == 1))


def landing_probability(accept_BK: torch.Tensor, parent_BK: torch.LongTensor | None = None) -> torch.Tensor:
    """`(B, K + 1)`: the probability that each regular token is the last accepted one.

    Args:
        accept_BK (`torch.Tensor` of shape `(B, K)`): Probability that each draft is accepted if its parent is.
        parent_BK (`torch.LongTensor` of shape `(B, K)`, *optional*): See [`~hf_mtp.layout.tree.ancestors`]; a chain if
            `None`.
    """
    accept_BR = torch.nn.functional.pad(accept_BK, (1, 0), value=1.0)
    if parent_BK is None:
        reached_BR = accept_BR.cumprod(dim=1)
        return torch.cat([reached_BR[:, :-1] - reached_BR[:, 1:], reached_BR[:, -1:]], dim=1)
    reached_BR = accept_BR[:, None].where(ancestors(parent_BK), 1.0).prod(dim=2)
    return reached_BR.scatter_add(1, parent_BK, -reached_BR[:, 1:]).clamp(min=0)


def mask_values(landing_BR: torch.Tensor, survival_k: torch.Tensor) -> torch.Tensor:
    """`(B, R, k)`: the expected number of tokens that each mask adds.

    Args:
        landing_BR (`torch.Tensor` of shape `(B, R)`): See [`landing_probability`].
        survival_k (`torch.Tensor` of shape `(k,)`): Probability that the first 1, 2 ... k drafts of a block are
            accepted.
    """
    return landing_BR[:, :, None] * survival_k


def choose_masks(value_BRk: torch.Tensor, budget: int) -> MaskPlan:
    """Chooses the most valuable masks of each row within a budget.

    Args:
        value_BRk (`torch.Tensor` of shape `(B, R, k)`): See [`mask_values`]. Values do not grow along a block; useless
            masks have 0.
        budget (`int`): M, at most R * k.

    Returns:
        [`MaskPlan`], sorted by anchor, then by step.
    """
    batch, regular, k = value_BRk.shape
    if not budget:
        return no_masks(batch, regular, k, value_BRk.device)
    # Ties go to the earlier mask of a block, so that blocks have no gaps.
    order_k = 1 - 1e-4 * torch.arange(k, device=value_BRk.device, dtype=value_BRk.dtype)
    value_BF = (value_BRk.clamp(min=0) * order_k).flatten(1)
    flat_BM = value_BF.topk(budget, dim=1, sorted=False).indices.sort(dim=1).values
    alive_BM = value_BF.gather(1, flat_BM) > 0
    column_BF = flat_BM.new_full((batch, regular * k), -1)
    column_BM = torch.arange(budget, device=flat_BM.device).expand_as(flat_BM)
    column_BF.scatter_(1, flat_BM, torch.where(alive_BM, column_BM, -1))
    column_BRk = column_BF.view(batch, regular, k)
    return MaskPlan(flat_BM // k, flat_BM % k + 1, alive_BM, column_BRk, is_chain=regular == 1)
