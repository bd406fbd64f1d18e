"""Peak memory of a process that decodes with one method. Each has its own process, whose peak begins after loading.

Linux only, because other systems cannot begin a new peak; there it is `None`.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from methods import PLAIN
from paired import encoded
from peer_methods import PeerModels, families

QUESTION, NEW_TOKENS = "Write a short story about a lighthouse.", 48
STATUS, NEW_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(where: tuple, name: str) -> float | None:
    """MiB of a process that decodes with the method `name` once loaded and warm, libraries and weights included.

    Args:
        where (`tuple`): Arguments of [`PeerModels`].
        name (`str`): A family of methods, whose last setting decodes, or `"plain"`.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(measured_here, where, name, torch.get_num_threads()).result()


def measured_here(where: tuple, name: str, threads: int = 1) -> float | None:
    """The same, in this process. Arguments are those of [`peak_memory`]."""
    if not NEW_PEAK.exists():
        return None
    torch.set_num_threads(threads)
    models = PeerModels(*where)
    method = PLAIN if name == "plain" else [*families(models)[name].values()][-1]
    inputs = encoded([QUESTION], models)
    models.decode(method, inputs, 8)
    NEW_PEAK.write_text("5")
    models.decode(method, inputs, NEW_TOKENS)
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)
