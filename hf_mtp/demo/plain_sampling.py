"""Plain decoding that samples the text which `generate(mtp=True)` samples with the same seed.

`generate(do_sample=True)` draws each token from torch's generator in the order of the draws. Multi-token prediction
draws by position instead ([`PositionNoise`]). With the same noise added to the scores, the likeliest token is the same
draw, and plain decoding needs nothing else: it takes the likeliest token.

Shapes: B batch, V vocabulary.
"""

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper

from ..decoding.noise import PositionNoise, draw_seed

# What a model's own generation config might add to sampling at a temperature.
WHOLE_DISTRIBUTION = {"top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0}


class NoiseByPosition(LogitsProcessor):
    """Adds the noise of the next position to the scores of one row.

    Args:
        noise ([`PositionNoise`]): The noise.
        prompt (`int`): Number of tokens of the prompt.
    """

    def __init__(self, noise: PositionNoise, prompt: int):
        self.noise, self.prompt = noise, prompt

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """`(B, V)`: the scores of the next token with its noise."""
        position = input_ids.shape[1] - self.prompt
        self.noise.forget_before(position)
        return scores + self.noise.at(position)


def plain_options(prompt_1T: torch.LongTensor, vocab_size: int, temperature: float, seed: int) -> dict:
    """Arguments of `generate` for plain decoding.

    Args:
        prompt_1T (`torch.LongTensor` of shape `(1, T)`): The prompt.
        vocab_size (`int`): V.
        temperature (`float`): Greedy if 0.
        seed (`int`): Seed of the generator that `generate(mtp=True)` gets.
    """
    if not temperature:
        return {"do_sample": False}
    drawn = draw_seed(torch.Generator().manual_seed(seed))
    noise = NoiseByPosition(PositionNoise(drawn, 0, vocab_size, prompt_1T.device), prompt_1T.shape[1])
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(temperature)), noise])
    return {"do_sample": False, "logits_processor": processors}


def mtp_options(temperature: float, seed: int) -> dict:
    """Arguments of `generate(mtp=True)` that sample the text of [`plain_options`]. Arguments are those.

    Args:
        temperature (`float`): Greedy if 0.
        seed (`int`): Seed.
    """
    if not temperature:
        return {"do_sample": False}
    generator = torch.Generator().manual_seed(seed)
    return {"do_sample": True, "temperature": float(temperature), "generator": generator, **WHOLE_DISTRIBUTION}
