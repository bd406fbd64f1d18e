"""`examples/scenarios` on the small base that ships, with an untrained adapter: every method writes the same text."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from scripts import importable
from transformers import AutoModelForCausalLM

from hf_mtp import GatedLoraConfig

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = ["code_completion", "mathematics", "long_form", "chat", "data_generation"]
TOY = EXAMPLES / "quickstart" / "base"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """The folder of an adapter for the small base."""
    folder = tmp_path_factory.mktemp("scenarios") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32)
    get_peft_model(base, GatedLoraConfig(k=3, r=4)).save_pretrained(folder)
    return folder


@pytest.fixture
def run(adapter, monkeypatch):
    """Runs a script as a command, with these options."""

    def run(script: str, *options: str, base: Path = TOY) -> None:
        known = ["--base", str(base), "--adapter", str(adapter), "--repeats", "1", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", [script, *options, *known])
        runpy.run_path(str(EXAMPLES / "scenarios" / f"{script}.py"), run_name="__main__")

    with importable(EXAMPLES / "scenarios"):
        yield run


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_scenario_prints_its_text_and_what_every_method_took(script, run, capsys):
    run(script, "--dtype", "float32", "--new-tokens", "24")
    printed = capsys.readouterr().out
    count = {"long_form": 1, "chat": 3, "data_generation": 8}.get(script, 2)
    assert printed.count("=" * 60) == count
    plain, mtp = printed.splitlines()[-2:]
    assert plain.startswith("plain") and mtp.startswith("mtp"), "float32 needs no bit for bit mode"
    assert f"same text {count}/{count}" in mtp and "1.00 per pass" in plain
    assert ("first token after" in mtp) == (script == "chat")


def test_half_precision_has_the_bit_for_bit_mode(run, capsys):
    run("code_completion", "--dtype", "bfloat16", "--new-tokens", "12")
    bitwise = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("bit for bit"))
    assert "same text 2/2" in bitwise


def test_all_of_them_write_one_report(run, tmp_path):
    run("run_all", str(tmp_path / "report.json"), "--dtype", "float32", "--quick")
    report = json.loads((tmp_path / "report.json").read_text())
    assert len({scenario["scenario"] for scenario in report["scenarios"]}) == len(report["scenarios"]) == 5
    for scenario in report["scenarios"]:
        assert len(scenario["texts"]) == len(scenario["prompts"]) == scenario["runs"]["mtp"]["same"]
    assert str(tmp_path) not in json.dumps(report)


def test_without_the_base_it_says_how_to_get_one(run, tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)There is no model in .*none.*examples/smollm2/base.py .*none"):
        run("chat", base=tmp_path / "none")
