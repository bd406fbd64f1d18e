"""What shows how a training is going: its progress bar, its curves, and callbacks that log through it."""

from transformers import ProgressCallback, Trainer

from .curves import TrainingCurves
from .decoding import DecodingCallback
from .progress import MTPProgressCallback


def watch(trainer: Trainer, curves: bool) -> None:
    """Makes a trainer show its losses and tokens per step.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer, with all its callbacks.
        curves (`bool`): Whether to draw a picture into its output folder.
    """
    for callback in [*trainer.callback_handler.callbacks]:
        if type(callback) is ProgressCallback:  # not a notebook's table, nor a bar of the user's own
            trainer.remove_callback(callback)
            trainer.add_callback(MTPProgressCallback())
        if isinstance(callback, DecodingCallback):
            callback.trainer = trainer
    if curves:
        trainer.add_callback(TrainingCurves())
