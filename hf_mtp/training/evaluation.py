"""Averages the measures of one evaluation over batches and processes. Knows nothing of how they are computed."""

import math
from collections import defaultdict

import torch
from accelerate.utils import gather_object
from transformers.utils import logging

from ..objective.compute import Objective
from ..objective.simulation import SimulatedDecoding

logger = logging.get_logger(__name__)

NO_TARGETS = (
    "No sequence of the evaluated dataset has two tokens in a row inside the loss, so there was nothing for a mask to "
    "predict, and the loss of this evaluation is NaN."
)


class EvaluationMeasures:
    """Measures of an evaluation, pooled over all masks, so that they do not depend on its batches."""

    def __init__(self):
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)
        self.simulated = SimulatedDecoding()

    def add(self, objective: Objective) -> None:
        """Adds one batch."""
        measures, weights = measures_of(objective), _numbers(objective.weights)
        if weights:  # some mask has a target
            measures["loss"] = objective.loss.item()
        for name, value in measures.items():
            weight = weights.get(name, 1)
            self.sums[name] += value * weight
            self.counts[name] += weight
        if objective.simulated is not None:
            self.simulated += objective.simulated

    def means(self) -> dict[str, float]:
        """The mean of each measure over all processes. All processes must call this together.

        `"loss"` is NaN if no mask had a target. It would otherwise be 0, the best there is.
        """
        sums, counts, simulated = defaultdict(float), defaultdict(float), SimulatedDecoding()
        for other in gather_object([(dict(self.sums), dict(self.counts), self.simulated)]):
            for name, value in other[0].items():
                sums[name] += value
                counts[name] += other[1][name]
            simulated += other[2]
        means = {name: value / counts[name] for name, value in sums.items() if counts[name]}
        if "loss" not in means:
            logger.warning(NO_TARGETS)
            means["loss"] = math.nan
        return means | ({"tokens_per_pass": simulated.tokens_per_pass} if simulated.passes else {})


def measures_of(objective: Objective) -> dict[str, float]:
    """The measures of one batch as plain numbers, by name."""
    return {**_numbers(objective.metrics), "mask_tokens": objective.rows}


def _numbers(tensors: dict[str, torch.Tensor] | None) -> dict[str, float]:
    """Scalar tensors as plain numbers, in one transfer."""
    return dict(zip(tensors, torch.stack([*tensors.values()]).tolist(), strict=True)) if tensors else {}
