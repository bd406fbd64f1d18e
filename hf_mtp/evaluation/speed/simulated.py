"""Simulates decoding of answers as evaluation during training does, to compare both figures.

Shapes: T tokens.
"""

from collections.abc import Iterable

import torch
from peft import PeftModel

from ...base.inspection import evaluation_mode, input_device
from ...layout.blocks import IGNORE
from ...objective.request import ObjectiveRequest
from ...objective.simulation import SimulatedDecoding


@torch.no_grad()
def simulated_decoding(model: PeftModel, texts: Iterable[tuple[list[int], list[int]]]) -> SimulatedDecoding:
    """Simulates quadratic decoding of known answers with the adapter's k, as `eval_tokens_per_pass` of training does.

    Args:
        model ([`~peft.PeftModel`]): An upgraded model.
        texts (`Iterable[tuple[list[int], list[int]]]`): Token ids of a prompt and of the base's greedy answer to it.

    Returns:
        [`SimulatedDecoding`], of all answers together. Zero tokens for models that allow no tree.
    """
    total = SimulatedDecoding()
    with evaluation_mode(model):
        for prompt, answer in texts:
            text_1T = torch.tensor([[*prompt, *answer]], device=input_device(model))
            labels_1T = text_1T.clone()
            labels_1T[:, : len(prompt)] = IGNORE
            objective = model(input_ids=text_1T, labels=labels_1T, mtp_objective=ObjectiveRequest())
            if objective.simulated is not None:
                total += objective.simulated
    return total
