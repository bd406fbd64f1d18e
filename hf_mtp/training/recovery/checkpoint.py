"""Writes and deletes checkpoints atomically, so that a killed process never leaves an incomplete one.

A checkpoint is written under a name that no tool recognizes, and renamed once it is completely on disk. An old one is
renamed before its files are deleted. Knows nothing of what is trained.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path

from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging

from ...base.files import sync

logger = logging.get_logger(__name__)

UNFINISHED = "_unfinished"  # the leading underscore keeps it off the Hub
CONTENTS = "contents.json"  # sizes of a checkpoint's files, and facts about its training
WEIGHTS_ONLY = (
    "%s has weights, but no state of the optimizer and of the learning rate schedule (`save_only_model=True`). Both "
    "start anew, so the learning rate rises again, and losses differ from those of an uninterrupted training."
)


class WholeCheckpoints(Trainer):
    """A [`~transformers.Trainer`] that saves and deletes checkpoints atomically, and resumes from complete ones.

    Several processes write one checkpoint. When all have finished, the process that saves the model renames it.
    """

    _unfinished: Path | None = None  # replaces the output folder during saving

    def checkpoint_facts(self) -> dict:
        """JSON-serializable facts about this training, stored with each checkpoint."""
        return {}

    def before_resuming(self, checkpoint: Path) -> None:
        """Called with the checkpoint to resume from, before anything changes. May raise to refuse it."""

    def weights_folder(self, checkpoint: Path) -> Path:
        """Where a checkpoint has the weights that `load_best_model_at_end` loads."""
        return checkpoint

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        run = Path(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete_checkpoint(run)
            if resume_from_checkpoint is None:
                raise ValueError(f"No complete checkpoint to resume from in {run}. Omit `resume_from_checkpoint`.")
        elif resume_from_checkpoint and (damage := damage_of(Path(resume_from_checkpoint))):
            logger.warning("%s is incomplete: it %s.", resume_from_checkpoint, damage)
        if resume_from_checkpoint:
            if not has_optimizer(Path(resume_from_checkpoint)):
                logger.warning(WEIGHTS_ONLY, resume_from_checkpoint)
            self.before_resuming(Path(resume_from_checkpoint))
            resume_from_checkpoint = str(resume_from_checkpoint)
        if self.is_local_process_zero():  # left over from a killed training
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:  # during saving, only the renamed folder is pushed
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial):
        run = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._unfinished = unfinished = run / UNFINISHED
        try:
            super()._save_checkpoint(model, trial)
            self._correct_best_checkpoint(run, unfinished / name)
            self._publish(unfinished / name, run / name)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        finally:
            self._unfinished = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            for checkpoint in checkpoints_over_limit(run, limit, best):
                delete_checkpoint(checkpoint)
            shutil.rmtree(unfinished, ignore_errors=True)

    def _load_best_model(self):
        best = self.state.best_model_checkpoint
        self.state.best_model_checkpoint = str(self.weights_folder(Path(best)))
        try:
            super()._load_best_model()
        finally:
            self.state.best_model_checkpoint = best

    def _publish(self, written: Path, checkpoint: Path) -> None:
        """Renames the checkpoint when all processes have written their files."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_checkpoint(written, checkpoint, self.checkpoint_facts())
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and written.is_dir():  # this machine has its own disk
            with suppress(FileNotFoundError):  # or the disk is shared, and the rename was not visible yet
                publish_checkpoint(written, checkpoint, self.checkpoint_facts())

    def _correct_best_checkpoint(self, run: Path, written: Path) -> None:
        """Corrects the path of the best checkpoint in the state: Trainer recorded it in the unfinished folder."""
        if not self.state.best_global_step:
            return
        best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best.name == written.name or best.is_dir():
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))


def publish_checkpoint(written: Path, checkpoint: Path, facts: dict) -> None:
    """Renames a completely written checkpoint, and replaces an older one of that name.

    Args:
        written (`Path`): Folder with all files of the checkpoint.
        checkpoint (`Path`): Its final path, on the same disk.
        facts (`dict`): JSON-serializable facts to store with it.
    """
    sizes = {str(file.relative_to(written)): file.stat().st_size for file in _files(written)}
    (written / CONTENTS).write_text(json.dumps({**facts, "files": sizes}, indent=2), encoding="utf-8")
    for path in (*_files(written), written):
        sync(path)
    delete_checkpoint(checkpoint)
    written.rename(checkpoint)
    sync(checkpoint.parent)


def delete_checkpoint(checkpoint: Path) -> None:
    """Deletes a checkpoint, if it exists, without ever leaving a half-deleted one under its name."""
    if not checkpoint.is_dir():
        return
    renamed = checkpoint.parent / UNFINISHED / f"old-{checkpoint.name}"
    shutil.rmtree(renamed, ignore_errors=True)
    renamed.parent.mkdir(exist_ok=True)
    shutil.rmtree(checkpoint.rename(renamed), ignore_errors=True)


def checkpoints_over_limit(run: Path, limit: int | None, best: str | None) -> list[Path]:
    """Checkpoints beyond `save_total_limit`, oldest first, without the newest and the best.

    Args:
        run (`Path`): Folder of the checkpoints.
        limit (`int`, *optional*): Number of checkpoints to keep; all if `None` or 0.
        best (`str`, *optional*): The best one.
    """
    if not limit or limit < 0:
        return []
    checkpoints = sort_checkpoints(str(run), use_mtime=True, best_model_checkpoint=best)
    protected = {str(Path(name)) for name in (checkpoints[-1], best) if name}
    return [Path(name) for name in checkpoints[: -max(limit, len(protected))]]


def newest_complete_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the most steps in `run`, if any. Warns of incomplete ones that it skips."""
    steps = {}
    for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if folder.is_dir() and step.isdigit():
            steps[int(step)] = folder
    for step in sorted(steps, reverse=True):
        damage = damage_of(steps[step])
        if damage is None:
            return steps[step]
        logger.warning("%s is skipped because it is incomplete: it %s.", steps[step], damage)
    return None


def damage_of(checkpoint: Path) -> str | None:
    """What is missing from a checkpoint, in words; `None` if it is complete."""
    for name, size in {TRAINER_STATE_NAME: 0, **contents(checkpoint).get("files", {})}.items():
        file = checkpoint / name
        if not file.is_file():
            return f"lacks {name}"
        if file.suffix != ".json" and file.stat().st_size < size:  # users may edit JSON files
            return f"has {file.stat().st_size:,} of the {size:,} bytes of {name}"
    return None


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint has the state of the optimizer and the schedule; DeepSpeed's is in a folder of its own."""
    return (checkpoint / SCHEDULER_NAME).is_file() or any(checkpoint.glob("global_step*"))


def contents(checkpoint: Path) -> dict:
    """Facts stored with a checkpoint, and the sizes of its files in bytes as `"files"`; empty if there are none."""
    file = checkpoint / CONTENTS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
