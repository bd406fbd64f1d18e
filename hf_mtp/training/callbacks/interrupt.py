"""Ctrl-C in training: finish the step, save, stop."""

import signal
import threading

from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)


class SaveOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends training after the current step, with a checkpoint; a second one ends it at once.

    Without it an interrupt throws away everything since the last checkpoint.
    """

    def __init__(self):
        self._previous_handler = None
        self._asked = False

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self.restore_handler()  # a training that begins again with smaller batches (`auto_find_batch_size`)
            self._asked = False
            self._previous_handler = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, signum, frame):
        self._asked = True
        signal.signal(signal.SIGINT, self._previous_handler)
        logger.warning("Interrupted: finishing this step, then saving a checkpoint. Ctrl-C again stops at once.")

    def on_step_end(self, args, state, control, **kwargs):
        if self._asked:
            control.should_save = control.should_training_stop = True

    def restore_handler(self) -> None:
        """Gives Ctrl-C back to whom it belonged before training. Safe to call twice."""
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None

    def on_train_end(self, args, state, control, **kwargs):
        if self._asked:
            logger.warning(
                "Stopped at step %d of %d. Go on with `trainer.train(resume_from_checkpoint=True)`.",
                state.global_step,
                state.max_steps,
            )
