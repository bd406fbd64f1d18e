"""Tests of the vLLM integration, in an environment with vLLM and without PEFT or TRL. `make test-vllm` makes it.

The variable HF_MTP_PYTHON names the Python of the project's own environment, which makes the models.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(HERE.parents[1]),
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def run_task(task: dict, **environment) -> dict:
    """What an engine makes of a task."""
    done = subprocess.run(
        [sys.executable, HERE / "engine.py"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, **environment},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def refusal_of(task: dict, **environment) -> str:
    """What an engine says that cannot start or run."""
    with pytest.raises(AssertionError) as caught:
        run_task(task, **environment)
    return str(caught.value)


class Case:
    """A base, an adapter, and what hf_mtp makes of some prompts."""

    def __init__(self, folder: Path):
        self.folder, self.reference = folder, json.loads((folder / "reference.json").read_text())
        self.rows, self.adapter, self.base = self.reference["rows"], str(folder / "exported"), str(folder / "base")
        self.prompts = [row["prompt"] for row in self.rows]

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
    """[`run_task`]."""
    return run_task


@pytest.fixture(scope="session")
def refusal():
    """[`refusal_of`]."""
    return refusal_of
