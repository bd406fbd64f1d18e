"""Wrong input of the command `hf-mtp`: what the error says, and that it comes before work that would be lost."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_base, upgraded
from tiny_text import tiny_tokenizer, words
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_mtp.cli.app import app
from hf_mtp.cli.documents import check_path
from hf_mtp.cli.verb import CLOSED_PIPE, _paragraph
from hf_mtp.data.rows import load_rows
from hf_mtp.evaluation import probe
from hf_mtp.pretrained import load_model, load_upgraded
from hf_mtp.serving.vllm_server import VllmSettings, serve_with_vllm


def error_of(*arguments: str, code: int) -> str:
    """What the command prints on stderr, as one line without colors and the frame around wrong usage."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return re.sub(r"[\s│]+", " ", re.sub(r"\x1b\[[\d;]*m", "", result.stderr))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A folder with a base, `base`, an adapter of it, `adapter`, and a plain LoRA on it, `lora`."""
    folder = tmp_path_factory.mktemp("errors")
    tiny_base("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    upgraded(AutoModelForCausalLM.from_pretrained(folder / "base")).save_pretrained(folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    plain = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    plain.save_pretrained(folder / "lora")
    return folder


ROWS = ("regenerate", "--model", "nowhere", "--dataset", "nowhere", "--output", "nowhere")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("generate", "nowhere", "text", "--plain", "--strategy", "cubic"), "'--strategy'.*'auto'.*'linear'"),
        (("chat", "nowhere", "--strategy", "cubic"), "'--strategy'"),
        (("serve", "nowhere", "--strategy", "cubic"), "'--strategy'"),
        (("generate", "nowhere", "text", "--top-p", "2"), "'--top-p'"),
        (("chat", "nowhere", "--temperature", "-1"), "'--temperature'"),
        (("serve", "nowhere", "--port", "99999"), "'--port'"),
        (("demo", "nowhere", "--port", "-1"), "'--port'"),
        (("serve", "nowhere", "--log-level", "loud"), "'--log-level'.*'critical'.*'trace'"),
        (("serve", "nowhere", "--shutdown-seconds", "-1"), "'--shutdown-seconds'"),
        (("verify", "nowhere", "--limit", "0"), "'--limit'"),
        (("verify", "nowhere", "--batch-size", "0"), "'--batch-size'"),
        (("evaluate", "nowhere", "--max-new-tokens", "0"), "'--max-new-tokens'"),
        (("evaluate", "nowhere", "--k", ","), "--k takes integers separated by commas"),
        (("probe", "nowhere", "--limit", "-2"), "'--limit'"),
        ((*ROWS, "--rows", "0"), "'--rows'"),
        ((*ROWS, "--prompt-tokens", "0"), "'--prompt-tokens'"),
    ],
)
def test_values_out_of_range_are_wrong_usage(arguments, message):
    assert re.search(message, error_of(*arguments, code=2))


@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_a_device_that_is_not_there(device, folders):
    with pytest.raises(ValueError, match=rf"must be one that this machine has \(cpu.*but got '{device}'"):
        load_model(str(folders / "adapter"), device=device)
    assert load_model(str(folders / "adapter"), device="cpu").device.type == "cpu"


def test_a_prompt_that_is_not_utf_8(tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in error_of("generate", "nowhere", "--file", str(tmp_path / "prompt.txt"), code=2)
    as_python_has_it = b"Gr\xfc\xdfe".decode(errors="surrogateescape")
    assert "Character 2 of the prompt is not UTF-8 text" in error_of("generate", "nowhere", as_python_has_it, code=2)


def test_a_file_of_rows_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*rows\.jsonl"):
        load_rows(str(tmp_path / "rows.jsonl"))


ARROW = """
import typer
from hf_mtp.cli.verb import run_alone, verb
@verb
def show() -> None:
    typer.echo("one \u2192 two")
run_alone(show)
"""


@pytest.mark.parametrize("encoding, shown", [("cp1252", "one ? two"), ("utf-8", "one \u2192 two")])
def test_text_that_the_encoding_of_stdout_lacks_does_not_end_a_command(encoding, shown):
    """As of files on Windows. The rest of the text was lost."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, "-c", ARROW], env=environment, capture_output=True)
    assert (result.returncode, result.stdout.decode(encoding).strip()) == (0, shown), result.stderr


def test_a_tilde_is_the_home_folder_and_not_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    error_of("verify", "nowhere", "--json=~/reports/x.json", "--limit=1", code=2)
    assert (tmp_path / "home" / "reports").is_dir() and not list((tmp_path / "here").iterdir())
    assert "home directory" in error_of("verify", "nowhere", "--json=~nobody-of-this-name/x.json", code=2)


def test_check_takes_an_adapter_for_its_base(folders):
    result = CliRunner().invoke(app, ["check", str(folders / "adapter"), "--json"])
    assert '"model_type": "llama"' in result.stdout and result.exit_code == 0


@pytest.mark.parametrize(
    "content, message", [("", "is empty"), ("hello\n", "is not JSON Lines"), ("[1]\n2\n", "is not")]
)
def test_a_dataset_that_is_not_json_lines(content, message, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"rows\.jsonl {message}.*needs one JSON object on each line"):
        load_rows(str(tmp_path / "rows.jsonl"))


def test_a_report_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"--json cannot write to .*out\.json: .*Pass a file that can be written"):
        check_path(tmp_path / "file" / "out.json")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot write to .*Permission denied"):
        patch.setattr(Path, "open", refuse)
        check_path(tmp_path / "out.json")
    (tmp_path / "mine.json").write_text("mine")
    check_path(tmp_path / "mine.json")
    check_path(tmp_path / "new.json")
    assert (tmp_path / "mine.json").read_text() == "mine" and not (tmp_path / "new.json").exists()


def refuse(*_):
    raise PermissionError(13, "Permission denied")


def test_verify_reads_the_prompts_before_the_model():
    assert "Unknown suite 'nowhere.jsonl'" in error_of("verify", "nowhere", "--suite", "nowhere.jsonl", code=2)


def test_train_does_not_replace_an_adapter(folders, tmp_path):
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "{words(20)}"}}\n')
    options = ("--dataset", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out"), "--use_cpu", "True")
    error = error_of("train", "--model", str(folders / "adapter"), *options, "--report_to", "none", code=1)
    assert f"Pass its base with --model ({folders / 'base'})" in error and not (tmp_path / "out").exists()


def test_a_plain_lora_is_not_an_adapter_of_ours(folders):
    for names in ((str(folders / "lora"),), (str(folders / "base"), str(folders / "lora"))):
        with pytest.raises(ValueError, match=r"lora is an adapter of type 'LORA', not one of hf_mtp.*Pass an adapter"):
            load_upgraded(*names)


def test_probe_makes_its_folder_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "out").write_text("mine")
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "{words(9)}"}}\n')
    monkeypatch.setattr("hf_mtp.evaluation.ranks.probe._measured", lambda *_: pytest.fail("measured"))
    with pytest.raises(NotADirectoryError, match="is a file, but results need a folder"):
        probe(
            tiny_base("llama"),
            tiny_tokenizer(),
            str(tmp_path / "prompts.jsonl"),
            max_new_tokens=6,
            output=tmp_path / "out",
        )
    assert (tmp_path / "out").read_text() == "mine"


def test_a_python_of_vllm_that_cannot_be_run(tmp_path):
    with pytest.raises(OSError, match="nowhere cannot be run: .*Pass its Python with --vllm-python"):
        serve_with_vllm(VllmSettings("adapter", python=str(tmp_path / "nowhere")))
    (tmp_path / "false").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "false").chmod(0o755)
    with pytest.raises(ImportError, match="false is not Python.*Pass its Python with --vllm-python"):
        serve_with_vllm(VllmSettings("adapter", python=str(tmp_path / "false")))


def test_errors_of_the_system_name_the_file():
    assert _paragraph(FileExistsError(17, "File exists", "out")).startswith("Error: out: File exists. (")


# ---------------------------------------------------------------- in a process of its own

CTRL_C = """
import sys

sys.argv = ["hf-mtp", "--help"]
from hf_mtp.cli.main import main


class Finder:
    @staticmethod
    def find_spec(name, *_):
        if name == "typer":
            raise KeyboardInterrupt


sys.meta_path.insert(0, Finder)
main()
"""

ECHO = """
import typer
from hf_mtp.cli.verb import run_alone, verb


def echo():
    typer.echo("text")


run_alone(verb(echo))
"""


def test_ctrl_c_during_imports_shows_no_traceback():
    result = subprocess.run([sys.executable, "-c", CTRL_C], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "")


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_a_closed_pipe_is_not_an_error_to_report(unbuffered):
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with os.fdopen(write, "w") as nobody:
        result = subprocess.run(
            [sys.executable, "-c", ECHO], stdout=nobody, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert (result.returncode, result.stderr) == (CLOSED_PIPE, "")
