"""Attaches the callbacks that report a training: progress bar, curves, decoding. Knows nothing of the objective."""

from transformers import ProgressCallback, Trainer

from .curves import TrainingCurves
from .decoding import DecodingCallback
from .progress import MTPProgressCallback


def attach_callbacks(trainer: Trainer, curves: bool) -> None:
    """Makes a trainer report its losses and tokens per pass.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer, with the user's callbacks.
        curves (`bool`): Whether to plot training curves into its output folder.
    """
    for callback in [*trainer.callback_handler.callbacks]:
        if type(callback) is ProgressCallback:  # not a subclass: a notebook's table or the user's own bar
            trainer.remove_callback(callback)
            trainer.add_callback(MTPProgressCallback())
        if isinstance(callback, DecodingCallback):
            callback.trainer = trainer
    if curves:
        trainer.add_callback(TrainingCurves())
