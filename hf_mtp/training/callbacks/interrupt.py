"""Handles Ctrl-C in training: finishes the step, saves a checkpoint, stops."""

import signal
import threading

from transformers import TrainerCallback
from transformers.utils import logging

from ...base.distributed import in_any_process

logger = logging.get_logger(__name__)


class SaveOnInterrupt(TrainerCallback):
    """Ends training after the current step, with a checkpoint, at the first Ctrl-C; at once at the second.

    All processes end after the same step, although the signal may reach them in different ones.
    """

    def __init__(self):
        self._previous_handler = None
        self._interrupted = False

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self.restore_handler()  # `auto_find_batch_size` begins training several times
            self._interrupted = False
            self._previous_handler = signal.signal(signal.SIGINT, self._handle_interrupt)

    def _handle_interrupt(self, signum, frame):
        self._interrupted = True
        signal.signal(signal.SIGINT, self._previous_handler)
        logger.warning("Interrupted: finishing this step, then saving a checkpoint. Ctrl-C again stops at once.")

    def on_step_end(self, args, state, control, **kwargs):
        self._interrupted = in_any_process(self._interrupted, args.device)
        if self._interrupted:
            control.should_save = control.should_training_stop = True

    def restore_handler(self) -> None:
        """Restores the handler from before training. Safe to call twice."""
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None

    def on_train_end(self, args, state, control, **kwargs):
        if self._interrupted:
            logger.warning(
                "Stopped at step %d of %d. Resume with `trainer.train(resume_from_checkpoint=True)`.",
                state.global_step,
                state.max_steps,
            )
