"""The sampler head: makes the drafts of one block coherent, each seeing the one before.

Knows embeddings and hidden states. Knows nothing of the base model, of vocabularies or of decoding.
"""

import torch
from torch import nn


class SamplerHead(nn.Module):
    """Two blocks of Linear -> SiLU -> LayerNorm over [embedding of the previous token ; hidden state of the mask].

    Its output goes through the base model's own unembedding (Samragh et al., arXiv 2507.11851, section 3.2).

    Args:
        embedding_size (`int`): E, size of a token embedding.
        hidden_size (`int`): D, size of a hidden state as the base's unembedding reads it.
        residual (`bool`, *optional*, defaults to `False`): Adds the mask's hidden state to the output. The last
            LayerNorm then starts at zero gain, so that an untrained head gives the mask's own prediction.
    """

    def __init__(self, embedding_size: int, hidden_size: int, residual: bool = False):
        super().__init__()
        self.residual = residual
        self.blocks = nn.Sequential(
            nn.Linear(embedding_size + hidden_size, hidden_size),
            nn.SiLU(),
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, hidden_size),
            nn.SiLU(),
            nn.LayerNorm(hidden_size),
        )
        if residual:
            nn.init.zeros_(self.blocks[-1].weight)

    def forward(self, previous: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """
        Args:
            previous (`torch.Tensor` of shape `(..., E)`): Embedding of the token before the one to predict.
            hidden (`torch.Tensor` of shape `(..., D)`): Last hidden state of the mask that stands for it.

        Returns:
            `torch.Tensor` of shape `(..., D)`, to be unembedded.
        """
        # The head may be kept in float32 over a half-precision base, as PEFT keeps the LoRA weights.
        dtype = self.blocks[0].weight.dtype
        refined = self.blocks(torch.cat([previous, hidden], dim=-1).to(dtype)).to(hidden.dtype)
        return hidden + refined if self.residual else refined
