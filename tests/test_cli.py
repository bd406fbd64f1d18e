"""The command `hf-mtp`: help at once, one paragraph per error, exit codes that scripts can use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_base
from transformers import XLNetConfig
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
