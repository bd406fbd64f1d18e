"""Tests of the vLLM integration, in an environment with vLLM and without PEFT or TRL. `make test-vllm` makes it.

The variable HF_MTP_PYTHON names the Python of the project's own environment, which makes the models.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(HERE.parents[1]),
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.update(ENVIRONMENT)  # before vLLM is imported

import engine  # noqa: E402
import pytest  # noqa: E402


def run_task(task: dict) -> dict | str:
    """What comes out of a task, or what the engine said before it failed. The process is a copy of this one."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "outcome.json"
        process = multiprocessing.get_context("fork").Process(target=engine.run, args=(task, output))
        process.start()
        process.join(600)
        process.kill()
        return json.loads(output.read_text()) if output.exists() else Path(f"{output}.log").read_text()


class Case:
    """A base, an adapter, and what hf_mtp makes of some prompts."""

    def __init__(self, folder: Path):
        self.folder, self.reference = folder, json.loads((folder / "reference.json").read_text())
        self.rows, self.adapter, self.base = self.reference["rows"], str(folder / "exported"), str(folder / "base")
        self.prompts, self.k = [row["prompt"] for row in self.rows], self.reference["k"]
        self.accepted = sum(new - 1 for row in self.rows for new in row["steps"])

    def task(self, *groups: dict, **more) -> dict:
        """A task for an engine with the adapter; each group has the prompts of the case, unless it has others."""
        arguments = more.pop("arguments", {})
        groups = [{"prompts": self.prompts, **group} for group in groups]
        return {"adapter": self.adapter, "arguments": arguments, "groups": groups, **more}

    def plain(self, *groups: dict, arguments: dict | None = None) -> dict:
        """The same for an engine without."""
        task = self.task(*groups, arguments={"model": self.base, **(arguments or {})})
        del task["adapter"]
        return task


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """A function that makes the case of an architecture, once."""
    made, root = {}, Path(os.environ.get("HF_MTP_CASES") or tmp_path_factory.mktemp("cases"))

    def get(architecture: str = "llama") -> Case:
        folder = root / architecture
        if architecture not in made and not (folder / "reference.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            command = [os.environ["HF_MTP_PYTHON"], HERE / "cases.py", folder, architecture]
            done = subprocess.run(
                command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=900
            )
            assert done.returncode == 0, done.stderr[-4000:]
        return made.setdefault(architecture, Case(folder))

    return get


@pytest.fixture(scope="session")
def run():
    """A function that runs a task."""

    def outcome(task: dict) -> dict:
        result = run_task(task)
        assert isinstance(result, dict), result[-8000:]
        return result

    return outcome


@pytest.fixture(scope="session")
def refusal():
    """A function that runs a task which cannot be run, and returns what the engine says."""

    def said(task: dict) -> str:
        result = run_task(task)
        assert isinstance(result, str)
        return result

    return said
