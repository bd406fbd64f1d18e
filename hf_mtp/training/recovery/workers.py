"""Explains the death of a data loader's worker process. Knows nothing of training."""

from pathlib import Path

ERROR_PREFIX = "DataLoader worker"  # of torch's message


def is_worker_death(error: RuntimeError) -> bool:
    """Whether torch raised the error because a worker of the data loader died."""
    return str(error).startswith(ERROR_PREFIX)


def worker_death_message(error: RuntimeError, workers: int, checkpoint: Path | None) -> str:
    """An error message with the likely causes and the remedies.

    Args:
        error (`RuntimeError`): torch's own.
        workers (`int`): `dataloader_num_workers`.
        checkpoint (`Path`, *optional*): The newest checkpoint.
    """
    resume = f"resume with `trainer.train(resume_from_checkpoint={str(checkpoint)!r})`"
    return (
        f"{str(error).strip(' .')}. This process, which loaded data, died, usually from running out of memory (see "
        "the system log) or from a crash in the dataset's code. Use fewer than "
        f"`dataloader_num_workers={workers}` (0 loads data in the training process and shows the dataset's own "
        "error), a smaller `dataloader_prefetch_factor` or smaller batches, and "
        f"{resume if checkpoint else 'start again'}."
    )
