"""Where an answer leaves that of plain decoding, and whether the two tokens were a tie for the base.

Shapes: T tokens, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...base.inspection import evaluation_mode, input_device
from ..decoded import GREEDY

# Rounding moves a logit by a few units, since it adds up over the layers. A bug moves it by hundreds.
TIE_UNITS = 4.0


@dataclass(frozen=True)
class Divergence:
    """The first token that differs from plain decoding.

    Args:
        prompt (`str`): Name of the prompt.
        position (`int`): Position among the new tokens.
        plain_token, other_token (`int`, *optional*): Both tokens; `None` where an answer has ended.
        gap (`float`, *optional*): Distance of the base's scores of both tokens, after the processors of its generation
            config. `None` if there are not two tokens, or one of them is forbidden.
        units (`float`, *optional*): The same in units of rounding: the distance from the largest logit to the next
            larger number of its dtype.
    """

    prompt: str
    position: int
    plain_token: int | None
    other_token: int | None
    gap: float | None = None
    units: float | None = None

    @property
    def is_tie(self) -> bool:
        """Whether rounding alone may decide which of the two tokens is larger: at most 4 units of rounding."""
        return self.units is not None and self.units <= TIE_UNITS


@torch.inference_mode()
def divergence_at(
    base: PreTrainedModel,
    prompt: str,
    prompt_ids: list[int],
    plain: list[int],
    other: list[int],
    position: int,
    noise_V: torch.Tensor | None = None,
) -> Divergence:
    """Compares the base's scores of the two tokens at the first difference.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base, with a switched-off or gated adapter.
        prompt (`str`): Name of the prompt.
        prompt_ids (`list[int]`): Its tokens.
        plain, other (`list[int]`): New tokens of plain decoding and of the other method.
        position (`int`): The first at which they differ.
        noise_V (`torch.Tensor` of shape `(V,)`, *optional*): Noise of sampling at this position, on any device.
    """
    both = [ids[position] if position < len(ids) else None for ids in (plain, other)]
    if None in both:
        return Divergence(prompt, position, *both)
    text_1T = torch.tensor([[*prompt_ids, *plain[:position]]], device=input_device(base))
    with evaluation_mode(base):
        logit_V = base(text_1T, logits_to_keep=1).logits[0, -1]
        score_V = _scores(base, text_1T)
    if noise_V is not None:
        score_V = score_V + noise_V.to(score_V.device)
    gap = abs(score_V[both[0]].item() - score_V[both[1]].item())
    if not math.isfinite(gap):
        return Divergence(prompt, position, *both)
    return Divergence(prompt, position, *both, gap, round(gap / unit_of_rounding(logit_V), 2))


def _scores(base: PreTrainedModel, text_1T: torch.LongTensor) -> torch.Tensor:
    """`(V,)`: the scores of the next token, after processors such as a repetition penalty."""
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "pad_token_id": 0}
    return base.generate(
        text_1T, attention_mask=torch.ones_like(text_1T), max_new_tokens=1, min_new_tokens=0, **options
    ).scores[0][0]


def unit_of_rounding(logit_V: torch.Tensor) -> float:
    """Distance from the largest logit, by magnitude, to the next larger number of its dtype.

    Args:
        logit_V (`torch.Tensor` of shape `(V,)`): Logits as the model gives them.
    """
    largest = logit_V.abs().max()
    return (torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest).item()
