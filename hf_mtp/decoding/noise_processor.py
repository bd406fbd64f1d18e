"""The noise of output positions as a logits processor: plain decoding then samples the text of `generate(mtp=True)`.

`generate(do_sample=True)` draws each token from torch's generator, in the order of the draws. Multi-token prediction
draws by position instead. With the same noise added to the scores, greedy decoding takes the same draws.

Shapes: B batch, V vocabulary.
"""

import torch
from transformers import LogitsProcessor

from .noise import PositionNoise

# Arguments of `generate` that sample from the whole distribution. A model's own generation config may narrow it, and
# does so for sampling only, which plain decoding with a [`NoiseProcessor`] is not.
WHOLE_DISTRIBUTION = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": None,
    "epsilon_cutoff": None,
    "eta_cutoff": None,
}


class NoiseProcessor(LogitsProcessor):
    """Adds to each row's scores the noise of its output position. The largest sum is a draw (the Gumbel-max trick).

    Args:
        noises (`list[PositionNoise]`): The noise of each row.
        prompt_length (`int`): Columns of the prompts, padding included.
    """

    def __init__(self, noises: list[PositionNoise], prompt_length: int):
        self.noises, self.prompt_length = noises, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`(B, V)`: the scores of the next token with its noise."""
        position = input_ids.shape[1] - self.prompt_length
        for noise in self.noises:
            noise.forget_before(position)
        return scores + torch.stack([noise.at(position) for noise in self.noises]).to(scores.device)
