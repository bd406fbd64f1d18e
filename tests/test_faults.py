"""What goes wrong while training: killed processes, numbers that are not finite, workers that die, wrong checkpoints."""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_training import SAVING, assert_same_end, trainer

from hf_mtp.checkpoint import UNFINISHED, flaw_of, newest_whole_checkpoint

# ---------------------------------------------------------------- killed

KILLS = 10
KILLED_RUN = {**SAVING, "save_steps": 1, "save_total_limit": 1, "max_steps": 8}


def in_a_child(action, *args, kill_after: float | None = None) -> int:
    """Calls `action` in a copy of this process, killed after that many seconds; gives its exit code, -9 if killed."""
    child = os.fork()
    if not child:
        try:
            action(*args)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        killer = threading.Timer(kill_after, os.kill, (child, signal.SIGKILL))
        killer.start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if kill_after is not None:
        killer.cancel()
        killer.join()  # no thread is there when the next copy is made
    return code


def kill_in_a_save(moment: int) -> None:
    """Kills this process at the `moment`-th time that Python opens, renames or deletes what belongs to a save."""
    moments = iter(range(moment, -1, -1))

    def count(event, args):
        about_saves = any(UNFINISHED in arg for arg in args if isinstance(arg, str))
        if about_saves and next(moments, None) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="trains in copies of this process")
def test_killed_at_any_moment_it_goes_on_from_a_whole_checkpoint(tmp_path):
    """The copies start with everything imported and the trainer made, so that each takes the time of its steps only."""
    whole = trainer(tmp_path / "whole", **KILLED_RUN)
    start = time.monotonic()
    whole.train()
    seconds = time.monotonic() - start
    folder = tmp_path / "killed"
    made = trainer(folder, **KILLED_RUN)

    def go_on(moment_of_a_save: int | None = None) -> None:
        if moment_of_a_save is not None:
            kill_in_a_save(moment_of_a_save)
        made.train(resume_from_checkpoint=newest_whole_checkpoint(folder) is not None)

    draw, unfinished = random.Random(0), 0
    for kill in range(KILLS):
        if kill % 2:
            assert in_a_child(go_on, kill_after=draw.uniform(0, seconds / 2)) in (-signal.SIGKILL, 0)
        else:
            assert in_a_child(go_on, draw.randint(1, 70)) == -signal.SIGKILL
            unfinished += Path(folder, UNFINISHED).is_dir()
        assert all(flaw_of(checkpoint) is None for checkpoint in folder.glob("checkpoint-*"))
    assert unfinished > 2
    go_on()
    assert_same_end(made, whole, steps=made.args.max_steps)
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [f"checkpoint-{made.args.max_steps}"]
