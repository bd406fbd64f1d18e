"""What a number was measured on."""

import importlib.metadata
import platform
from pathlib import Path

import torch

LIBRARIES = ("hf_mtp", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


def describe_machine() -> dict[str, str | int | dict]:
    """Processor, cores and versions; the accelerator's name if there is one."""
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


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
