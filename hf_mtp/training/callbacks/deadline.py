"""Training that ends at a wall-clock time, with a learning rate that follows the clock."""

import math
import time

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

TICKS = 10_000  # length, in steps, of the schedule that the clock plays


class Deadline(TrainerCallback):
    """Ends training when its time is up.

    Args:
        minutes (`float`): Time from the first step on. A resumed training gets it anew.
    """

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes
        self.start = math.inf

    @property
    def share(self) -> float:
        """Share of the time that has passed, 0 to 1."""
        return min(1.0, max(0.0, (time.monotonic() - self.start) / self.seconds))

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if self.share >= 1.0:
            control.should_log = control.should_training_stop = True

    def drive(self, schedule: LambdaLR) -> None:
        """Makes a schedule of [`TICKS`] steps follow the clock instead of the steps."""
        schedule.lr_lambdas = [
            lambda step, by_step=by_step: by_step(max(1, round(self.share * TICKS))) for by_step in schedule.lr_lambdas
        ]
