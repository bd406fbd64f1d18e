"""The sampler head: makes the drafts of one block coherent, each seeing the one before.

Knows embeddings and hidden states. Knows nothing of the base model, of vocabularies or of decoding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
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

    def given(self, hidden_BKD: torch.Tensor) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """The same for a block of masks whose tokens become known one after the other.

        What depends on the hidden states alone is computed at once.

        Args:
            hidden_BKD (`torch.Tensor` of shape `(B, K, D)`): Last hidden states of the blocks' masks.

        Returns:
            A function of a step, 0..K-1, and the embeddings `(B, E)` of the tokens before: features `(B, D)`.
        """
        mix, *rest = self.blocks
        if mix.weight.dim() != 2:  # spread over processes: only calling the layer gathers it
            return lambda step, previous_BE: self(previous_BE, hidden_BKD[:, step])
        split = mix.in_features - hidden_BKD.shape[-1]
        from_hidden_KBD = F.linear(hidden_BKD.to(mix.weight.dtype), mix.weight[:, split:], mix.bias).unbind(dim=1)
        from_previous_DE = mix.weight[:, :split].mT

        def refine(step: int, previous_BE: torch.Tensor) -> torch.Tensor:
            refined = torch.addmm(from_hidden_KBD[step], previous_BE.to(mix.weight.dtype), from_previous_DE)
            for layer in rest:
                refined = layer(refined)
            refined = refined.to(hidden_BKD.dtype)
            return hidden_BKD[:, step] + refined if self.residual else refined

        return refine
