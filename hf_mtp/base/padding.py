"""Makes one batch of prompts of different lengths."""

from collections.abc import Sequence

import torch


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Token ids `(B, T)` of prompts, padded on the left as `generate` wants them, and their attention mask.

    Args:
        prompts (`Sequence[Sequence[int]]`): Token ids of each row.
        pad (`int`): The padding token.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + [*prompt] for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
