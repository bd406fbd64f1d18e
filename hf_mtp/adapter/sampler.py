"""The sampler head: makes the drafts of one block coherent by conditioning each on the previous one.

Knows embeddings and hidden states. Knows nothing of the base model, of vocabularies or of decoding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..base.autocast import concatenate

# Most likely tokens of a mask that a decoder chooses a draft from. With masks trained, the right one is among the
# first ten (Samragh et al., arXiv 2507.11851, fig. 2).
SHORTLIST = 32


class SamplerHead(nn.Module):
    """Two blocks of Linear -> SiLU -> LayerNorm over [embedding of the previous token ; hidden state of the mask].

    Its output goes through the base model's own unembedding (Samragh et al., arXiv 2507.11851, section 3.2).

    Args:
        embedding_size (`int`): E, size of a token embedding.
        hidden_size (`int`): D, size of a hidden state as the base's unembedding reads it.
        residual (`bool`, *optional*, defaults to `False`): Adds the mask's hidden state to the output. The last
            LayerNorm then starts at zero gain, so that an untrained head gives the mask's own prediction.
        recurrent (`bool`, *optional*, defaults to `False`): The first block also sees its own output for the previous
            mask, so that a draft depends on all earlier drafts. Initialized to have no effect.
    """

    def __init__(self, embedding_size: int, hidden_size: int, residual: bool = False, recurrent: bool = False):
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
        self.recurrence = nn.Linear(hidden_size, hidden_size, bias=False) if recurrent else None
        if residual:
            nn.init.zeros_(self.blocks[-1].weight)
        if recurrent:
            nn.init.zeros_(self.recurrence.weight)

    def forward(self, previous_CKE: torch.Tensor, hidden_CKD: torch.Tensor) -> torch.Tensor:
        """Refines the hidden states of masks, where the token before each is known.

        Args:
            previous_CKE (`torch.Tensor` of shape `(C, K, E)`): Embeddings of the tokens before those to predict.
            hidden_CKD (`torch.Tensor` of shape `(C, K, D)`): Last hidden states of the masks that stand for them, in
                the order of their block.

        Returns:
            `torch.Tensor` of shape `(C, K, D)`, to be unembedded.
        """
        if self.recurrence is not None:
            refine = self.refiner(hidden_CKD)
            return torch.stack([refine(step, previous) for step, previous in enumerate(previous_CKE.unbind(1))], dim=1)
        # The head may be kept in float32 over a half-precision base, as PEFT keeps the LoRA weights.
        dtype = self.blocks[0].weight.dtype
        refined = self.blocks(concatenate([previous_CKE, hidden_CKD], dim=-1).to(dtype)).to(hidden_CKD.dtype)
        return hidden_CKD + refined if self.residual else refined

    def refiner(self, hidden_BKD: torch.Tensor) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """Refines the hidden states of masks one by one, as the tokens before them become known.

        What depends on the hidden states alone is computed at once.

        Args:
            hidden_BKD (`torch.Tensor` of shape `(B, K, D)`): Last hidden states of the blocks' masks.

        Returns:
            A function of a step, 0..K-1, and the embeddings `(B, E)` of the tokens before: features `(B, D)`. To be
            called once for each step, in order.
        """
        mix, activation, norm, *rest = self.blocks
        # Else the weight is spread over processes, or offloaded, until its layer is called.
        dtype, is_whole = mix.weight.dtype, mix.weight.dim() == 2 and not mix.weight.is_meta
        if is_whole:
            split = mix.in_features - hidden_BKD.shape[-1]
            from_hidden_KBD = F.linear(hidden_BKD.to(dtype), mix.weight[:, split:], mix.bias).unbind(dim=1)
            from_previous_DE = mix.weight[:, :split].mT
        state_BD = None  # of the recurrence

        def refine(step: int, previous_BE: torch.Tensor) -> torch.Tensor:
            nonlocal state_BD
            if is_whole:
                mixed = torch.addmm(from_hidden_KBD[step], previous_BE.to(dtype), from_previous_DE)
            else:
                mixed = mix(concatenate([previous_BE, hidden_BKD[:, step]], dim=-1).to(dtype))
            if state_BD is not None:
                mixed = mixed + self.recurrence(state_BD)
            refined = norm(activation(mixed))
            state_BD = None if self.recurrence is None else refined
            for layer in rest:
                refined = layer(refined)
            refined = refined.to(hidden_BKD.dtype)
            return hidden_BKD[:, step] + refined if self.residual else refined

        return refine
