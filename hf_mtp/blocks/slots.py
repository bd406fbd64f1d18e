"""Which masks of the next forward pass are worth computing.

After each of R regular tokens a block of up to k masks can hang. Its i-th mask is of use if decoding ends up at that
token and the drafts of the i - 1 masks before it are accepted too. A budget of M slots goes to the likeliest of all
R * k. With M = R * k this is the paper's quadratic decoding; with a block on the last token only it is its linear one.
(Budgeted quadratic decoding as in github.com/mandt-lab/ptp.)

Pure functions of tensors. Shapes: B batch, K drafts, R = K + 1 regular tokens, k masks per block, M slots.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slots:
    """The masks of one forward pass.

    Args:
        anchor_BM (`torch.LongTensor` of shape `(B, M)`): Regular token, 0..R-1, that each mask hangs on.
        step_BM (`torch.LongTensor` of shape `(B, M)`): Its place in its block, 1..k.
        alive_BM (`torch.BoolTensor` of shape `(B, M)`): False for slots that a row has no use for.
        column_BRk (`torch.LongTensor` of shape `(B, R, k)`): Slot of each mask of each block, -1 if it has none.
        is_chain (`bool`): Whether all masks form one block on the last regular token.
    """

    anchor_BM: torch.LongTensor
    step_BM: torch.LongTensor
    alive_BM: torch.BoolTensor
    column_BRk: torch.LongTensor
    is_chain: bool = False

    @property
    def drafts_BR(self) -> torch.LongTensor:
        """`(B, R)`: masks that hang on each regular token."""
        return (self.column_BRk >= 0).sum(dim=2)

    def of_row(self, row: int) -> "Slots":
        """Those of one row, B = 1."""
        own = slice(row, row + 1)
        return Slots(self.anchor_BM[own], self.step_BM[own], self.alive_BM[own], self.column_BRk[own])


def no_slots(batch: int, regular: int, k: int, device: torch.device) -> Slots:
    """No mask at all after `regular` tokens."""
    none = torch.empty(batch, 0, dtype=torch.long, device=device)
    return Slots(none, none, none.bool(), none.new_full((batch, regular, k), -1))


def landing_probability(accept_BK: torch.Tensor) -> torch.Tensor:
    """`(B, K + 1)`: the probability that exactly the first 0, 1 ... K drafts are accepted.

    Args:
        accept_BK (`torch.Tensor` of shape `(B, K)`): Probability that each draft is accepted if all before it are.
    """
    one_B1 = accept_BK.new_ones(accept_BK.shape[0], 1)
    reached_BR = torch.cat([one_B1, accept_BK.cumprod(dim=1)], dim=1)
    return reached_BR * torch.cat([1 - accept_BK, one_B1], dim=1)


def slot_values(landing_BR: torch.Tensor, survival_k: torch.Tensor) -> torch.Tensor:
    """`(B, R, k)`: the expected number of tokens that each mask brings.

    Args:
        landing_BR (`torch.Tensor` of shape `(B, R)`): See [`landing_probability`].
        survival_k (`torch.Tensor` of shape `(k,)`): Probability that the first 1, 2 ... k drafts of a block are
            accepted.
    """
    return landing_BR[:, :, None] * survival_k


def choose_slots(value_BRk: torch.Tensor, budget: int) -> Slots:
    """Gives `budget` slots to the most valuable masks of each row.

    Args:
        value_BRk (`torch.Tensor` of shape `(B, R, k)`): See [`slot_values`]; not growing along a block, 0 for masks of
            no use.
        budget (`int`): M, at most R * k.

    Returns:
        [`Slots`], sorted by anchor, then by step.
    """
    batch, regular, k = value_BRk.shape
    if not budget:
        return no_slots(batch, regular, k, value_BRk.device)
    # Among equals the earlier mask of a block comes first: a block has no gaps.
    order_k = 1 - 1e-4 * torch.arange(k, device=value_BRk.device, dtype=value_BRk.dtype)
    value_BF = (value_BRk.clamp(min=0) * order_k).flatten(1)
    flat_BM = value_BF.topk(budget, dim=1, sorted=False).indices.sort(dim=1).values
    alive_BM = value_BF.gather(1, flat_BM) > 0
    column_BF = flat_BM.new_full((batch, regular * k), -1)
    column_BM = torch.arange(budget, device=flat_BM.device).expand_as(flat_BM)
    column_BF.scatter_(1, flat_BM, torch.where(alive_BM, column_BM, -1))
    k_or_1 = max(k, 1)  # there may be no mask at all
    column_BRk = column_BF.view(batch, regular, k)
    return Slots(flat_BM // k_or_1, flat_BM % k_or_1 + 1, alive_BM, column_BRk, is_chain=batch == regular == 1)
