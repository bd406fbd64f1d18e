"""Averages the measures of one evaluation over batches and processes. Knows nothing of how they are computed."""

from collections import defaultdict

import torch
from accelerate.utils import gather_object

from ..objective.compute import Objective
from ..objective.simulation import SimulatedDecoding


class EvaluationMeasures:
    """Sums of each measure over the batches of an evaluation. Simulated decoding is pooled over all tokens."""

    def __init__(self):
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.simulated = SimulatedDecoding()

    def add(self, objective: Objective) -> None:
        """Adds one batch."""
        for name, value in measures_of(objective).items():
            self.sums[name] += value
            self.counts[name] += 1
        if objective.simulated is not None:
            self.simulated += objective.simulated

    def means(self) -> dict[str, float]:
        """The mean of each measure over all processes. All processes must call this together."""
        sums, counts, simulated = defaultdict(float), defaultdict(int), SimulatedDecoding()
        for other in gather_object([(dict(self.sums), dict(self.counts), self.simulated)]):
            for name, value in other[0].items():
                sums[name] += value
                counts[name] += other[1][name]
            simulated += other[2]
        means = {name: value / counts[name] for name, value in sums.items()}
        return means | ({"tokens_per_pass": simulated.tokens_per_pass} if simulated.passes else {})


def measures_of(objective: Objective) -> dict[str, float]:
    """The measures of one batch as plain numbers, by name."""
    values = torch.stack(list(objective.metrics.values())).tolist() if objective.metrics else []
    return {**dict(zip(objective.metrics or {}, values, strict=True)), "mask_tokens": objective.rows}
