"""Arguments with which plain decoding and `generate(mtp=True)` sample the same text for the same seed."""

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from ..decoding.noise import PositionNoise, draw_seed
from ..decoding.noise_processor import WHOLE_DISTRIBUTION, NoiseProcessor


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
    noise = NoiseProcessor([PositionNoise(drawn, 0, vocab_size, prompt_1T.device)], prompt_1T.shape[1])
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
