"""The quickstart, end to end and offline, as a new user runs it but with less of everything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "examples" / "quickstart" / "quickstart.py"


def run(*arguments: str, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess:
    """Runs the script in a process of its own, from a folder that has nothing to do with it."""
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "COLUMNS": "120", **environment},
        cwd=script.parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """One short run, and its output folder."""
    output = tmp_path_factory.mktemp("quickstart")
    arguments = {"--steps": 3, "--prompts": 1, "--new-tokens": 16, "--k": 3, "--output": output}
    return run(*(str(part) for item in arguments.items() for part in item)), output


def test_it_succeeds_and_is_quiet(finished):
    process, _ = finished
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""  # no warnings, no chatter, no bars but its own
    assert "{'loss'" not in process.stdout


def test_it_prints_a_table_a_sample_and_what_to_type_next(finished):
    lines = finished[0].stdout.splitlines()
    for domain in ("maths", "python"):
        (row,) = (line.split() for line in lines if line.split()[:1] == [domain])
        assert float(row[1]) >= 1 and row[3] == "->" and row[5].endswith("x") and row[6] == "1/1"
    assert any("tokens per step" in line for line in lines if line.startswith("Training"))
    assert "a | stands where the next one begins" in finished[0].stdout
    assert 'from_pretrained("Qwen/Qwen3-0.6B")' in finished[0].stdout


def test_results_say_that_every_answer_is_the_same(finished):
    results = json.loads((finished[1] / "results.json").read_text())
    assert {"machine", "arguments", "seconds", "training"} <= results.keys()
    assert {"torch", "transformers", "peft", "trl"} <= results["machine"]["versions"].keys()
    assert set(results["domains"]) == {"maths", "python"}
    assert results["by_k"]["prompts"] == 1
    assert all(list(curve) == ["1", "2", "3"] for curve in results["by_k"]["tokens_per_step"].values())
    for domain in results["domains"].values():
        assert domain["identical"] == domain["prompts"] == 1
        for record in domain["per_prompt"]:
            assert sum(record["steps"]) == record["new_tokens"] == record["forward_passes_plain"]
            assert len(record["steps"]) == record["forward_passes_mtp"]


def test_it_saves_an_adapter_with_a_card_and_no_checkpoints(finished):
    names = {path.name for path in finished[1].iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "results.json",
        "tokens_per_step.png",
        "training_curves.png",
    }
    assert "| python |" in (finished[1] / "README.md").read_text(encoding="utf-8")


def test_the_picture_shows_two_lines(finished):
    from matplotlib.image import imread

    pixels = imread(finished[1] / "tokens_per_step.png")
    assert pixels.shape[0] > 400 and pixels.shape[1] > 600
    for red, green, blue in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
        distance = abs(pixels[..., :3] * 255 - (red, green, blue)).sum(axis=-1)
        assert (distance < 8).sum() > 300


def test_bad_arguments_get_a_clear_error():
    process = run("--prompts", "0")
    assert process.returncode == 2 and "--prompts must be more than 0" in process.stderr


def test_a_copy_without_the_repository_says_so(tmp_path):
    copy = tmp_path / "elsewhere" / SCRIPT.name
    copy.parent.mkdir()
    copy.write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    process = run(script=copy)
    assert process.returncode == 1 and "make quickstart" in process.stderr and "model.safetensors" in process.stderr


def test_a_missing_package_is_named():
    code = (
        "import runpy, sys; sys.modules['matplotlib'] = None; sys.argv = ['quickstart.py']; "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and "needs matplotlib," in process.stderr and "[quickstart]" in process.stderr
