"""Threads that compute: which of them keep OpenMP's helpers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TASKS = Path("/proc/self/task")
SCRIPT = """
import os, time, torch
from hf_mtp.base.threads import in_own_thread
torch.set_num_threads(2)
count = lambda: len(os.listdir("/proc/self/task"))
compute = lambda: torch.ones(1000, 1000).exp().sum().item()
before = count()
in_own_thread(compute)
for _ in range(100):  # they end a little later than the thread
    if count() == before:
        break
    time.sleep(0.1)
after = count()
compute()
print(after - before, count() - after)
"""


@pytest.mark.skipif(not TASKS.exists(), reason="needs Linux, which lists the threads of a process")
def test_the_helpers_of_a_thread_end_with_it():
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    output = subprocess.run([sys.executable, "-c", SCRIPT], env=env, check=True, capture_output=True, text=True).stdout
    assert output.split() == ["0", "1"]  # a thread that stays keeps one helper


def test_what_a_call_raises_comes_out():
    from hf_mtp.base.threads import in_own_thread

    with pytest.raises(ZeroDivisionError):
        in_own_thread(lambda: 1 / 0)
