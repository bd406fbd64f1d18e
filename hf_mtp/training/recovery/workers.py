"""A worker process of the data loader that dies: what the user is told."""

from pathlib import Path

DIED = "DataLoader worker"  # how torch's message of it begins


def died(error: BaseException) -> bool:
    """Whether an error says that a worker of the data loader was killed or ended by itself."""
    return isinstance(error, RuntimeError) and str(error).startswith(DIED)


def explain_death(error: BaseException, workers: int, checkpoint: Path | None) -> str:
    """What happened, what it cost and what to do.

    Args:
        error (`BaseException`): torch's own.
        workers (`int`): `dataloader_num_workers`.
        checkpoint (`Path`, *optional*): The newest one.
    """
    resume = f"go on with `trainer.train(resume_from_checkpoint={str(checkpoint)!r})`" if checkpoint else "start again"
    return (
        f"{str(error).strip(' .')}. It read data for this training and is gone, most often for want of memory (the "
        "system's log tells) or because of a crash in the dataset's own code. Use fewer than "
        f"`dataloader_num_workers={workers}` (0 reads in the training's process and shows the dataset's own error), a "
        f"smaller `dataloader_prefetch_factor` or smaller batches, and {resume}."
    )
