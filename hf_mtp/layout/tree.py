"""A tree of drafts: several drafts may follow the same token, as alternatives.

Column 0 is the pending token and columns 1..K are drafts. Each draft has a parent, the column of the token that it
follows; parents come before their children. The pass reads all of them at once, and each attends to its ancestors
only. This is tree attention (Miao et al., SpecInfer, arXiv 2305.09781; Cai et al., Medusa, arXiv 2401.10774). A chain
is the tree in which draft i follows draft i - 1.

Pure functions of tensors. Shapes: B batch, K drafts, R = K + 1 columns.
"""

import torch


def ancestors(parent_BK: torch.LongTensor) -> torch.BoolTensor:
    """`(B, R, R)`: whether the second column is the first one or one of its ancestors.

    Args:
        parent_BK (`torch.LongTensor` of shape `(B, K)`): The column of each draft's parent, 0..K - 1.
    """
    batch, drafts = parent_BK.shape
    step_BRR = torch.eye(drafts + 1, device=parent_BK.device).repeat(batch, 1, 1)  # from a column to its parent
    step_BRR[:, 1:].scatter_(2, parent_BK[:, :, None], 1.0)
    for _ in range(drafts.bit_length()):  # doubles the number of steps
        step_BRR = (step_BRR @ step_BRR).clamp(max=1.0)
    return step_BRR > 0


def depths(ancestor_BRR: torch.BoolTensor) -> torch.LongTensor:
    """`(B, R)`: how many tokens each column is after the pending one."""
    return ancestor_BRR.sum(dim=2) - 1


def accepted_path(right_BK: torch.BoolTensor, ancestor_BRR: torch.BoolTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns from the pending token to the last accepted draft.

    Args:
        right_BK (`torch.BoolTensor` of shape `(B, K)`): Whether each draft is the token that the base chooses after
            its parent. Of several children, at most one is.
        ancestor_BRR (`torch.BoolTensor` of shape `(B, R, R)`): See [`ancestors`].

    Returns:
        `(B, R)` columns, of which the first `accepted + 1` of each row are the path; `(B,)` accepted drafts.
    """
    is_wrong_BR = torch.nn.functional.pad(~right_BK, (1, 0))
    rejected_BR = (ancestor_BRR & is_wrong_BR[:, None]).any(dim=2)
    # All accepted columns are on one path, and later ones are deeper.
    path_BR = rejected_BR.long().argsort(dim=1, stable=True)
    return path_BR, (~rejected_BR).sum(dim=1) - 1
