"""The command `hf-mtp`: help at once, one paragraph per error, exit codes that scripts can use."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_base, upgraded
from tiny_text import tiny_tokenizer, words
from transformers import AutoModelForCausalLM, XLNetConfig
from typer.testing import CliRunner

import hf_mtp
from hf_mtp.cli.main import app

# What pip writes into bin/ for an entry point, and what was imported on the way.
SCRIPT = """
import sys
from hf_mtp.cli.main import main
try:
    main()
finally:
    print("torch" in sys.modules, "transformers" in sys.modules, file=sys.stderr)
"""


@pytest.fixture
def script(tmp_path):
    """Runs the installed command in a process of its own: its exit code, stdout and stderr."""
    path = tmp_path / "hf-mtp"
    path.write_text(SCRIPT)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, path, *arguments], capture_output=True, text=True, cwd=Path(hf_mtp.__file__).parents[1]
        )

    return run


def run(*arguments: str, code: int = 0, input: str | None = None):
    """Runs the command in this process, and returns what it printed on stdout and stderr."""
    result = CliRunner().invoke(app, list(arguments), input=input, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"], ["--version"]])
def test_help_needs_no_torch(script, arguments):
    result = script(*arguments)
    assert (result.returncode, result.stderr) == (0, "False False\n")


def test_help_lists_every_verb_and_each_has_an_example():
    verbs = [path.stem for path in Path(hf_mtp.__file__).parent.joinpath("cli").glob("*.py")]
    commands = {command.callback.__name__: command for command in app.registered_commands}
    assert commands and commands.keys() <= set(verbs)
    listed = run("--help").output
    for name in commands:
        assert name in listed
        assert f"hf-mtp {name}" in run(name, "--help").output.partition("Example:")[2]


def test_version():
    assert run("--version").output.strip() == hf_mtp.__version__


def test_wrong_usage_ends_with_two():
    assert "Missing argument" in run("check", code=2).stderr
    assert "No such option" in run("check", "--nothing", code=2).stderr


def test_an_error_is_one_paragraph(script, tmp_path):
    result = script("check", str(tmp_path))
    assert result.returncode == 1 and result.stdout == ""
    message, _ = result.stderr.splitlines()[-2:]
    assert message.startswith("Error: ") and str(tmp_path) in message
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(script, tmp_path):
    result = script("check", str(tmp_path), "--debug")
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_check_says_how_a_model_decodes(tmp_path):
    tiny_base("llama").config.save_pretrained(tmp_path)
    assert "llama: quadratic (mode: tree)" in run("check", str(tmp_path)).stdout
    report = json.loads(run("check", str(tmp_path), "--json").stdout)
    assert report["exact"] and report["strategy"] == "quadratic" and report["checks"]["linear"] == "exact"


def test_check_fails_for_a_model_that_cannot_be_upgraded(tmp_path):
    XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=64).save_pretrained(tmp_path)
    assert "not supported" in run("check", str(tmp_path), code=1).stdout


# ---------------------------------------------------------------- verify and evaluate


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[str, str]:
    """Folders of a tiny base, with a tokenizer, and of its adapter."""
    folder = tmp_path_factory.mktemp("saved")
    base = tiny_base("llama")
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    upgraded(AutoModelForCausalLM.from_pretrained(folder / "base"), 3).save_pretrained(folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": words(9, start=index), "domain": f"d{index % 2}"} for index in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SHORT = ("--max-new-tokens", "6", "--limit", "1")


def test_verify_ends_with_zero_where_all_is_equal(saved, prompts, tmp_path):
    base, adapter = saved
    options = ("--prompts", prompts, "--dtype", "float32,float64", "--json", str(tmp_path / "out.json"), *SHORT)
    output = run("verify", base, "--adapter", adapter, *options).stdout
    assert output.count("2 of 2 answers equal") == 12 and "DIFFERENT" not in output
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["equal"] and [one["dtype"] for one in report["reports"]] == ["float32", "float64"]


def test_verify_ends_with_one_and_shows_both_tokens_where_something_differs(saved, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hf_mtp.decoding.verification.chosen_tokens", lambda score_xV, noise_xV: score_xV.argmin(dim=-1)
    )
    options = ("--prompts", prompts, "--strategy", "quadratic", "--json", str(tmp_path / "out.json"), *SHORT)
    output = run("verify", saved[1], "--greedy-only", *options, code=1).stdout
    assert "0 of 2 answers equal" in output and output.rstrip().endswith("DIFFERENT")
    assert "units of rounding apart, NO tie" in output and "1, new token 0: plain 'w" in output
    (comparison,) = json.loads((tmp_path / "out.json").read_text())["reports"][0]["comparisons"]
    assert [one["tie"] for one in comparison["divergences"]] == [False, False]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Missing argument"),
        (["{base}"], "is a base model. Pass the Hub id or the folder of its adapter"),
        (["{adapter}", "--adapter", "{adapter}"], "is an adapter itself"),
        (["{base}", "--adapter", "{base}"], "is not the Hub id or the folder of an adapter"),
        (["{other}", "--adapter", "{adapter}"], "trained for a base of hidden size 32.*has 48"),
        (["{adapter}", "--prompts", "nowhere.jsonl"], "There is no suite 'nowhere.jsonl'"),
        (["{adapter}", "--strategy", "cubic"], "`strategies` must be one or more of"),
        (["{adapter}", "--k", "9"], "`k` must be between 1 and 3"),
    ],
)
def test_errors_of_verify_end_with_two(arguments, message, saved, tmp_path):
    tiny_base("llama", hidden_size=48).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    folders = {"base": saved[0], "adapter": saved[1], "other": str(tmp_path / "other")}
    error = run("verify", *(argument.format(**folders) for argument in arguments), code=2).stderr
    assert re.search(message, " ".join(error.split()))


def test_evaluate_writes_everything_and_goes_on_after_an_interrupt(saved, prompts, tmp_path, monkeypatch):
    options = (
        "--suite",
        prompts,
        "--k",
        "1,3",
        "--strategies",
        "quadratic",
        "--output",
        str(tmp_path / "out"),
        *SHORT,
    )
    with monkeypatch.context() as patch:
        patch.setattr("hf_mtp.evaluation.runner._turn", interrupt)
        assert "The same command goes on" in run("evaluate", saved[1], *options, code=130).stderr
    output = run("evaluate", saved[1], *options).stdout
    assert "| domain | prompt lookup | quadratic, k=1 | quadratic, k=3 |" in output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"results.json", "table.md", "curves.png", "curves.svg"}
    error = run("evaluate", saved[1], *options, "--batch-size", "2", code=1).stderr
    assert "has the results of another run: batch_size was 1, now it is 2" in " ".join(error.split())


def interrupt(*args):
    raise KeyboardInterrupt


def test_evaluate_completes_the_card(saved, prompts, tmp_path):
    adapter = shutil.copytree(saved[1], tmp_path / "adapter")
    options = ("--suite", prompts, "--strategies", "linear", "--output", str(tmp_path / "out"), *SHORT)
    run("evaluate", saved[0], "--adapter", str(adapter), "--card", *options)
    assert "## Evaluation" in (adapter / "README.md").read_text()
    assert "is not a folder" in run("evaluate", "me/adapter", "--card", code=2).stderr


def test_evaluate_says_so_where_matplotlib_is_missing(saved, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mtp.evaluation.curves.can_draw", lambda: False)
    monkeypatch.setattr("hf_mtp.evaluation.files.can_draw", lambda: False)
    options = ("--suite", prompts, "--strategies", "linear", "--output", str(tmp_path / "out"), *SHORT)
    assert "no curves: matplotlib is not installed" in run("evaluate", saved[1], *options).stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "table.md"}


def test_numbers_must_be_numbers(saved):
    assert "--k takes whole numbers" in run("evaluate", saved[1], "--k", "one", code=2).stderr
