"""Checkpoints that are whole or not there, whatever ends the process that writes or deletes one.

A checkpoint is written where no tool looks for one, and gets its name when all of it is on the disk. One that is no
longer wanted loses its name before its files. Knows nothing of what is trained.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging

from ...base.files import sync

logger = logging.get_logger(__name__)

UNFINISHED = "_unfinished"  # what begins with an underscore is not pushed to the Hub
CONTENTS = "contents.json"  # what a whole checkpoint holds, and facts about the training that wrote it


class WholeCheckpoints(Trainer):
    """What a trainer adds to [`~transformers.Trainer`] to save and resume so.

    Several processes write one checkpoint: the one that saves the model names it when all have written.
    """

    _unfinished: Path | None = None  # while saving: the folder that stands in for the output folder

    def checkpoint_facts(self) -> dict:
        """What a later training needs to know about this one, in JSON's terms; kept with each checkpoint."""
        return {}

    def before_resuming(self, checkpoint: Path) -> None:
        """Called with the checkpoint to resume from before anything is changed. May raise."""

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        run = Path(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole_checkpoint(run)
            if resume_from_checkpoint is None:
                raise ValueError(f"No whole checkpoint to resume from in {run}. Leave `resume_from_checkpoint` out.")
        elif resume_from_checkpoint and (flaw := flaw_of(Path(resume_from_checkpoint))):
            logger.warning("%s is not whole: it %s.", resume_from_checkpoint, flaw)
        if resume_from_checkpoint:
            self.before_resuming(Path(resume_from_checkpoint))
            resume_from_checkpoint = str(resume_from_checkpoint)
        if self.is_local_process_zero():  # what a killed training was writing or deleting
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:  # else it is pushed under its own name, later
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial):
        run = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._unfinished = unfinished = run / UNFINISHED
        try:
            super()._save_checkpoint(model, trial)
            self._name_the_best(run, unfinished / name)
            self._finish(unfinished / name, run / name)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        finally:
            self._unfinished = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        if self.args.should_save:
            for checkpoint in surplus(run, self.args.save_total_limit, self.state.best_model_checkpoint):
                discard(checkpoint)
            shutil.rmtree(unfinished, ignore_errors=True)

    def _finish(self, written: Path, checkpoint: Path) -> None:
        """Gives the checkpoint its name when all processes have written their part."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish(written, checkpoint, self.checkpoint_facts())
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and written.is_dir():  # a machine with a disk of its own
            with suppress(FileNotFoundError):  # or it is shared, and shows late what the first process did
                finish(written, checkpoint, self.checkpoint_facts())

    def _name_the_best(self, run: Path, written: Path) -> None:
        """Corrects the folder that the state calls the best, which Trainer has looked for among the unfinished."""
        if not self.state.best_global_step:
            return
        best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best.name == written.name or best.is_dir():
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))


def finish(written: Path, checkpoint: Path, facts: dict) -> None:
    """Gives a written checkpoint its name, in the place of an older one of that name.

    Args:
        written (`Path`): Folder with all files of the checkpoint.
        checkpoint (`Path`): Its name from now on, on the same disk.
        facts (`dict`): Kept with it.
    """
    sizes = {str(file.relative_to(written)): file.stat().st_size for file in _files(written)}
    (written / CONTENTS).write_text(json.dumps({**facts, "files": sizes}, indent=2), encoding="utf-8")
    for path in (*_files(written), written):
        sync(path)
    discard(checkpoint)
    written.rename(checkpoint)
    sync(checkpoint.parent)


def discard(checkpoint: Path) -> None:
    """Deletes a checkpoint, if it is there, so that it is never seen half deleted."""
    if not checkpoint.is_dir():
        return
    nameless = checkpoint.parent / UNFINISHED / f"old-{checkpoint.name}"
    shutil.rmtree(nameless, ignore_errors=True)
    nameless.parent.mkdir(exist_ok=True)
    shutil.rmtree(checkpoint.rename(nameless), ignore_errors=True)


def surplus(run: Path, limit: int | None, best: str | None) -> list[Path]:
    """Checkpoints beyond `save_total_limit`, oldest first. The newest and the best one are never among them.

    Args:
        run (`Path`): Folder of the checkpoints.
        limit (`int`, *optional*): How many to keep; all if `None` or 0.
        best (`str`, *optional*): The best one.
    """
    if not limit or limit < 0:
        return []
    checkpoints = sort_checkpoints(str(run), use_mtime=True, best_model_checkpoint=best)
    protected = {str(Path(name)) for name in (checkpoints[-1], best) if name}
    return [Path(name) for name in checkpoints[: -max(limit, len(protected))]]


def newest_whole_checkpoint(run: Path) -> Path | None:
    """The whole checkpoint of most steps in `run`, if there is any; warns of others that it passes over."""
    steps = {}
    for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if folder.is_dir() and step.isdigit():
            steps[int(step)] = folder
    for step in sorted(steps, reverse=True):
        flaw = flaw_of(steps[step])
        if flaw is None:
            return steps[step]
        logger.warning("%s is passed over, since it is not whole: it %s.", steps[step], flaw)
    return None


def flaw_of(checkpoint: Path) -> str | None:
    """What a checkpoint lacks of what was written, in words; `None` if it is whole."""
    for name, size in {TRAINER_STATE_NAME: 0, **contents(checkpoint).get("files", {})}.items():
        file = checkpoint / name
        if not file.is_file():
            return f"lacks {name}"
        if file.suffix != ".json" and file.stat().st_size < size:  # people edit the others
            return f"has {file.stat().st_size:,} of the {size:,} bytes of {name}"
    return None


def contents(checkpoint: Path) -> dict:
    """Facts kept with a checkpoint and, under `"files"`, its files with their sizes in bytes; empty if it has none."""
    file = checkpoint / CONTENTS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
