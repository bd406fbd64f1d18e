"""GitHub's workflows: each can be read, and calls only what the repository has."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def commands(workflow: Path) -> str:
    """The shell commands of a workflow."""
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
    return "\n".join(step.get("run", "") for job in jobs for step in job["steps"])


def test_there_is_one_for_tests_pages_and_releases():
    assert [path.stem for path in WORKFLOWS] == ["ci", "docs", "release"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_is_there(workflow):
    text = commands(workflow)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= set(targets)
    for path in re.findall(r"(?:GITHUB_WORKSPACE/|^)(\.ci/run|examples/[\w/.]+)", text, re.MULTILINE):
        assert (ROOT / path).exists()
