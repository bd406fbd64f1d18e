"""The machine that computes: what it is, and whether it multiplies bfloat16 fast."""

import importlib.metadata
import platform
import time
from pathlib import Path

import torch

LIBRARIES = ("hf_mtp", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


def bfloat16_is_faster(size: int = 256, repeats: int = 8) -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones, found in a fraction of a second.

    A CPU that has no instructions for bfloat16 does not. A trial finds this out on any kind of CPU and torch release.

    Args:
        size (`int`, *optional*, defaults to 256):
            Rows and columns of the matrices. Emulated bfloat16 takes a thousand times as long, so they are small.
        repeats (`int`, *optional*, defaults to 8): Products per dtype, of which the fastest counts.
    """

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.ones(2, size, size, dtype=dtype)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < seconds(torch.float32)


def describe_machine() -> dict[str, str | int | dict]:
    """The processor, the number of threads, versions of libraries, and the name of the GPU, if any."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    description = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }
    if torch.cuda.is_available():
        description["accelerator"] = torch.cuda.get_device_name()
    return description


def threads_in_words(machine: dict) -> str:
    """`"1 thread"`, `"2 threads"` and so on.

    Args:
        machine (`dict`): As from [`describe_machine`].
    """
    return f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
