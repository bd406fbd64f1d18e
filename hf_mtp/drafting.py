"""Draft: from the hidden states of one block of masks to the tokens they stand for.

Drafts need not be right, only likely: verification decides. So nothing here has to be exact.
"""

import torch
from torch import nn

from .sampler import SamplerHead


def draft_greedily(
    pending: torch.LongTensor,
    hidden_KD: torch.Tensor,
    embedding: nn.Module,
    unembedding: nn.Module,
    sampler: SamplerHead | None,
) -> torch.LongTensor:
    """The likeliest token for each mask of a block, each given the one before.

    Args:
        pending (`torch.LongTensor` of shape `(1,)`): The token before the first draft.
        hidden_KD (`torch.Tensor` of shape `(K, D)`): Last hidden states of the block's masks, in order.
        embedding, unembedding (`torch.nn.Module`): The base model's input and output layers.
        sampler ([`SamplerHead`], *optional*): Without it, each draft is what the unembedding makes of its mask alone.

    Returns:
        `torch.LongTensor` of shape `(K,)`.
    """
    if sampler is None:
        return unembedding(hidden_KD).argmax(dim=-1)
    drafts = []
    for hidden_1D in hidden_KD[:, None]:
        pending = unembedding(sampler(embedding(pending), hidden_1D)).argmax(dim=-1)
        drafts.append(pending)
    return torch.cat(drafts) if drafts else pending[:0]
