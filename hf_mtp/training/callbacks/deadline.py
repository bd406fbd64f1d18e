"""Ends training at a wall-clock time, and makes the learning rate follow the clock."""

import math
import time
from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from ...base.distributed import in_first_process

SCHEDULE_STEPS = 10_000  # length of a schedule that follows the clock


class Deadline(TrainerCallback):
    """Ends training when its time is up.

    The clock of the first process counts for all. By their own clocks, processes would use different learning rates
    and end after different steps.

    Args:
        minutes (`float`): Time from the first step on. It starts again when a training is resumed.
    """

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes
        self.start = math.inf
        self._share = 0.0

    @property
    def share(self) -> float:
        """Fraction of the time that had passed at the latest optimizer step, 0 to 1."""
        return self._share

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self._share = time.monotonic(), 0.0

    def on_optimizer_step(self, args, state, control, **kwargs):  # the schedule's step follows
        passed = (time.monotonic() - self.start) / self.seconds
        self._share = in_first_process(min(1.0, passed), args.device)

    def on_step_end(self, args, state, control, **kwargs):
        if self.share >= 1.0:
            control.should_log = control.should_training_stop = True

    def follow_clock(self, schedule: LambdaLR) -> None:
        """Makes a schedule of [`SCHEDULE_STEPS`] steps follow the clock instead of the training steps."""

        def at_clock(by_step: Callable[[int], float]) -> Callable[[int], float]:
            return lambda _: by_step(max(1, round(self.share * SCHEDULE_STEPS)))

        schedule.lr_lambdas = [at_clock(by_step) for by_step in schedule.lr_lambdas]
