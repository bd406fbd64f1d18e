"""Noise tokens: tokens of the vocabulary as masks, as in Uno (Sahoo et al., arXiv 2609.04010).

Such an adapter has no mask embeddings: the base embeds masks like any other token. Only the gated LoRA marks them as
masks.

Shapes: B batch, M masks.
"""

import torch
from torch import nn

SEED = 0


class NoiseTokens(nn.Module):
    """Chooses the token that each mask is embedded as.

    In training every mask gets a random token, so that the LoRA learns to ignore it. In evaluation the token of each
    mask is fixed, so that the same pass makes the same drafts. The base verifies all drafts, so the output does not
    depend on it.

    Args:
        k (`int`): Number of masks.
        vocab_size (`int`): V; tokens are drawn from all ids 0..V-1.
    """

    def __init__(self, k: int, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(vocab_size, (k,), generator=generator, device="cpu")
        self.register_buffer("ids", ids, persistent=False)  # which depends on k and V alone

    def forward(self, index_BM: torch.LongTensor) -> torch.LongTensor:
        """`(B, M)`: token ids for masks of these numbers, 0..k-1."""
        if self.training:
            return torch.randint_like(index_BM, self.vocab_size)
        return self.ids.to(index_BM.device)[index_BM]
