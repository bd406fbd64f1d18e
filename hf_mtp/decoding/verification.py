"""Verify: accepts drafts by the base model's own logits.

A draft is accepted if it is the token that the base model chooses after the draft's parent: the most likely one, or,
when sampling, the one that maximises its score plus the noise of its position. So the output is that of plain
decoding, whatever the drafts are. Of several alternatives, at most one is that token.

Knows logits, processors and stopping criteria as transformers defines them. Knows nothing of masks or caches.

Shapes: B batch, K drafts, R = K + 1 positions, V vocabulary, G rows of a group.
"""

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..layout.tree import accepted_path, ancestors, depths
from .drafters.base import Drafts
from .sequence import Sequence, padded_ids, stacked_records

NONE_TO_DRAW = -2  # in place of a token; -1 is a draft that is not there


def chosen_tokens(score_xV: torch.Tensor, noise_xV: torch.Tensor | None) -> torch.LongTensor:
    """`(...)`: the tokens that the base chooses; [`NONE_TO_DRAW`] where no token can be sampled.

    Args:
        score_xV (`torch.Tensor` of shape `(..., V)`): The base's scores, after the processors.
        noise_xV (`torch.Tensor` of the same shape, *optional*): Noise for sampling; greedy decoding if `None`.
    """
    # Of equal scores the first, as `argmax` has it, which takes several times as long on a CPU.
    if noise_xV is None:
        return score_xV.max(dim=-1).indices
    best = (score_xV + noise_xV).max(dim=-1)
    return best.indices.where(best.values.isfinite(), NONE_TO_DRAW)


def refuse_undrawn(tokens: list[int]) -> None:
    """Refuses tokens of which one could not be drawn. Plain decoding has the same error from torch.

    Raises:
        RuntimeError: The scores of a position are all minus infinity, or one of them is infinite or NaN.
    """
    if NONE_TO_DRAW in tokens:
        raise RuntimeError(
            "No token can be sampled: all scores of a position are -inf, or one of them is inf or NaN. Check the "
            "logits processors of the call, and load the model in a dtype that its weights fit into (bfloat16 or "
            "float32 instead of float16)."
        )


def noise_of(sequences: list[Sequence], positions: int) -> torch.Tensor | None:
    """`(B, R, V)`: the noise of each row's next positions; `None` in greedy decoding."""
    if sequences[0].noise is None:
        return None
    return torch.stack(
        [torch.stack([row.noise.at(row.new_tokens + place) for place in range(positions)]) for row in sequences]
    )


def verify_together(
    logits_BRV: torch.Tensor, drafts: Drafts, noise_BRV: torch.Tensor | None, processors: LogitsProcessorList
) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor | None, torch.Tensor]:
    """Verifies all positions of all rows at once, for processors that depend on the scores alone.

    Args:
        logits_BRV (`torch.Tensor` of shape `(B, K + 1, V)`): The base's logits before the first draft and after each.
        drafts ([`Drafts`]): K per row.
        noise_BRV (`torch.Tensor` of shape `(B, K + 1, V)`, *optional*): Noise of the next K + 1 positions for
            sampling; greedy if `None`.
        processors ([`~transformers.LogitsProcessorList`]): The processors.

    Returns:
        `(B, R)` tokens that the base chooses after each column; `(B,)` accepted drafts; for a tree `(B, R)` columns,
        of which the first `accepted + 1` are those of the pending token and the accepted drafts, and `None` for a
        chain; `(B, R, V)` scores.
    """
    score_BRV = logits_BRV
    # Plain decoding rounds to float32. Of a narrower dtype, that changes no value.
    if processors or score_BRV.dtype.itemsize > torch.float32.itemsize:
        logits_XV = logits_BRV.flatten(0, 1).to(torch.float32, copy=True)  # processors may write
        score_BRV = (processors(None, logits_XV) if processors else logits_XV).view(logits_BRV.shape)
    if drafts.parent_BK is None:
        token_BR = chosen_tokens(score_BRV, noise_BRV)
        accepted_B = (token_BR[:, :-1] == drafts.token_BK).long().cumprod(dim=1).sum(dim=1)
        return token_BR, accepted_B, None, score_BRV
    ancestor_BRR = ancestors(drafts.parent_BK)
    if noise_BRV is not None:  # alternatives share the noise of their position
        noise_BRV = noise_BRV.gather(1, depths(ancestor_BRR)[:, :, None].expand_as(noise_BRV))
    token_BR = chosen_tokens(score_BRV, noise_BRV)
    path_BR, accepted_B = accepted_path(token_BR.gather(1, drafts.parent_BK) == drafts.token_BK, ancestor_BRR)
    return token_BR, accepted_B, path_BR, score_BRV


def verify_in_order(
    group: list[Sequence],
    logits_GRV: torch.Tensor,
    drafts: Drafts,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    pad_token: int | None,
) -> list[list[int]]:
    """Extends rows of equal length by the same number of tokens.

    Processors and criteria are called once per token, with the whole group, as in plain decoding. The group stops
    after the first token that is no draft of a row, or that stops a row.

    Args:
        group (`list[Sequence]`): The rows, extended in place.
        logits_GRV (`torch.Tensor` of shape `(G, K + 1, V)`): The base's logits before the first draft and after each.
        drafts ([`Drafts`]): The drafts of these rows.
        processors ([`~transformers.LogitsProcessorList`]), criteria ([`~transformers.StoppingCriteriaList`]): Those of
            the group.
        pad_token (`int`, *optional*): The token that follows in rows that ended; `None` if these go on as before.

    Returns:
        For each row, the columns of the pending token and of the drafts that equal its new tokens.

    Raises:
        RuntimeError: See [`refuse_undrawn`].
    """
    rows_G, columns = torch.arange(len(group), device=logits_GRV.device), [[0] for _ in group]
    column_G = torch.zeros_like(rows_G)
    while True:
        stopped_G = torch.tensor([row.is_stopped for row in group], device=logits_GRV.device)
        logits_GV = logits_GRV[rows_G, column_G].to(
            torch.float32
        )  # a copy, as in plain decoding; processors may write
        score_GV = processors(padded_ids(group, 0), logits_GV)
        noise_G1V = noise_of(group, 1)
        token_G = chosen_tokens(score_GV, None if noise_G1V is None else noise_G1V[:, 0])
        if pad_token is not None:
            token_G = token_G.masked_fill(stopped_G, pad_token)
        if noise_G1V is not None:
            refuse_undrawn(token_G.tolist())
        for index, row in enumerate(group):
            here = slice(index, index + 1)
            row.append(token_G[here], logits_GV[here], score_GV[here])
        scores = stacked_records(group, "score") if group[0].keeps_scores else None
        stops_G = criteria(padded_ids(group, 0), scores).to(stopped_G.device) & ~stopped_G
        for row, stops in zip(group, stops_G.tolist(), strict=True):
            row.is_stopped = row.is_stopped or stops
        column_G = _child_of(drafts, column_G, token_G)
        reached = column_G.tolist()
        for visited, column in zip(columns, reached, strict=True):
            visited += [column] if column else []
        if bool(stops_G.any()) or not all(reached):
            break
    for row in group:
        row.is_finished = row.is_stopped and (pad_token is not None or all(other.is_stopped for other in group))
    return columns


def _child_of(drafts: Drafts, column_G: torch.LongTensor, token_G: torch.LongTensor) -> torch.LongTensor:
    """`(G,)`: the column of the draft that follows a column and equals a token; 0 if there is none."""
    is_child_GK = (drafts.parents_BK == column_G[:, None]) & (drafts.token_BK == token_G[:, None])
    number_K = torch.arange(1, drafts.count + 1, device=column_G.device)
    return (is_child_GK * number_K).sum(dim=1)
