"""Noise for sampling that depends only on the seed, the row and the output position.

The token that maximises log p + Gumbel noise is a draw from p (the Gumbel-max trick). A drafter that adds the same
noise to its own scores mostly picks the same token, and a draft is accepted where both agree (Daliri, Musco and
Suresh, arXiv 2408.07978). So the text depends on the seed, and not on how drafts are made or how many are verified.

Shapes: V vocabulary.
"""

import torch

_MASK = (1 << 64) - 1


class PositionNoise:
    """The noise of one row.

    Args:
        seed (`int`): Seed of the call.
        row (`int`): Number of the row in the call.
        vocab_size (`int`): V.
        device (`torch.device`): Device that draws the noise. CPUs and GPUs draw different numbers, as always in torch.
    """

    def __init__(self, seed: int, row: int, vocab_size: int, device: torch.device):
        self.seed, self.vocab_size, self.device = _mixed(seed, row), vocab_size, device
        self.generator = torch.Generator(device)
        # Uniform numbers in float32 are too coarse near 1, where unlikely tokens win.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self._drawn: dict[int, torch.Tensor] = {}

    def at(self, position: int) -> torch.Tensor:
        """`(V,)`, float32: the Gumbel noise at an output position. The first new token has position 0."""
        if position not in self._drawn:
            self.generator.manual_seed(_mixed(self.seed, position))
            uniform_V = torch.rand(self.vocab_size, generator=self.generator, dtype=self.dtype, device=self.device)
            self._drawn[position] = -(-uniform_V.log()).log().float()
        return self._drawn[position]

    def forget_before(self, position: int) -> None:
        """Frees the noise of earlier positions."""
        self._drawn = {place: noise for place, noise in self._drawn.items() if place >= position}


def draw_seed(generator: torch.Generator | None) -> int:
    """The seed of a call: one draw from the user's generator, or from torch's global one if it is `None`."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def _mixed(seed: int, number: int) -> int:
    """Mixes a number into a seed by the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
