"""The command `hf-mtp`: help at once, one paragraph per error, exit codes that scripts can use."""

import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_base, upgraded
from tiny_text import tiny_tokenizer, words
from transformers import AutoModelForCausalLM, XLNetConfig
from typer.testing import CliRunner

import hf_mtp
from hf_mtp import MTPTrainer, pretrained
from hf_mtp.cli.app import app
from hf_mtp.cli.session import Session
from hf_mtp.pretrained import load_model, load_tokenizer

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
        examples = run(name, "--help").output.partition("Example:")[2].partition("╭")[0]
        assert f"hf-mtp {name}" in examples
        assert all(line.count("hf-mtp ") <= 1 for line in examples.splitlines())  # each on a line of its own


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
    options = ("--suite", prompts, "--dtype", "float32,float64", "--json", str(tmp_path / "out.json"), *SHORT)
    output = run("verify", base, "--adapter", adapter, *options).stdout
    assert output.count("2 of 2 answers equal") == 12 and "DIFFERENT" not in output
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["equal"] and [one["dtype"] for one in report["reports"]] == ["float32", "float64"]
    alone = run("verify", base, "--adapter", adapter, "--greedy-only", "--suite", prompts, "--json", "-", *SHORT)
    assert json.loads(alone.stdout)["equal"] and "answers equal" in alone.stderr


def test_verify_ends_with_one_and_shows_both_tokens_where_something_differs(saved, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hf_mtp.decoding.verification.chosen_tokens", lambda score_xV, noise_xV: score_xV.argmin(dim=-1)
    )
    options = ("--suite", prompts, "--strategies", "quadratic", "--json", str(tmp_path / "out.json"), *SHORT)
    output = run("verify", saved[1], "--greedy-only", *options, code=1).stdout
    assert "0 of 2 answers equal" in output and output.rstrip().endswith("DIFFERENT")
    assert "units of rounding apart, NO tie" in output and "1, new token 0: plain 'w" in output
    (comparison,) = json.loads((tmp_path / "out.json").read_text())["reports"][0]["comparisons"]
    assert [one["tie"] for one in comparison["divergences"]] == [False, False]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Missing argument"),
        (["{base}"], "is a base model without an adapter. Pass the Hub id or folder of its adapter"),
        (["{adapter}", "--adapter", "{adapter}"], "is an adapter, not a base model"),
        (["{base}", "--adapter", "{base}"], "is not an adapter: it has no adapter_config.json"),
        (["{other}", "--adapter", "{adapter}"], "trained for a base of hidden size 32.*has 48"),
        (["{adapter}", "--suite", "nowhere.jsonl"], "Unknown suite 'nowhere.jsonl'"),
        (["{adapter}", "--strategies", "cubic"], "`strategies` must be one or more of"),
        (["{adapter}", "--k", "9"], "`k` must be between 1 and 3"),
        (["{adapter}", "--k", "0"], "`k` must be between 1 and 3"),
        (["{adapter}", "--dtype", "auto,int8"], "must be 'auto' or one of torch's floating-point types.* got 'int8'"),
        (["{adapter}", "--dtype", "nought"], "must be 'auto' or one of torch's floating-point types.* got 'nought'"),
        (["{adapter}", "--dtype", ","], "--dtype takes at least one dtype"),
        (["{adapter}", "--json", "{folder}"], "--json writes to a file, but .* is a folder"),
    ],
)
def test_errors_of_verify_end_with_two(arguments, message, saved, tmp_path):
    tiny_base("llama", hidden_size=48).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    folders = {"base": saved[0], "adapter": saved[1], "other": str(tmp_path / "other"), "folder": str(tmp_path)}
    error = run("verify", *(argument.format(**folders) for argument in arguments), code=2).stderr
    assert re.search(message, " ".join(error.split()))


def test_verify_keeps_the_report_of_each_dtype(saved, prompts, tmp_path, monkeypatch):
    load = pretrained.load_upgraded

    def out_of_memory_in_the_second(model, adapter, dtype):
        if dtype == "float32":
            raise torch.OutOfMemoryError("simulated")
        return load(model, adapter, dtype)

    monkeypatch.setattr(pretrained, "load_upgraded", out_of_memory_in_the_second)
    file = tmp_path / "verify.json"
    options = ("--dtype", "float64,float32", "--suite", prompts, "--json", str(file), *SHORT)
    assert "simulated" in run("verify", saved[1], "--greedy-only", *options, code=2).stderr
    assert [report["dtype"] for report in json.loads(file.read_text())["reports"]] == ["float64"]


def test_verify_makes_the_folder_of_its_report(saved, prompts, tmp_path):
    file = tmp_path / "new" / "out.json"
    run("verify", saved[1], "--greedy-only", "--suite", prompts, "--strategies", "linear", "--json", str(file), *SHORT)
    assert json.loads(file.read_text())["equal"]


def test_evaluate_does_not_write_into_a_file(saved, prompts, tmp_path):
    (tmp_path / "out").write_text("mine")
    error = run("evaluate", saved[1], "--suite", prompts, "--output", str(tmp_path / "out"), *SHORT, code=1).stderr
    assert "is a file, but results need a folder" in " ".join(error.split())
    assert (tmp_path / "out").read_text() == "mine"


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
        patch.setattr("hf_mtp.evaluation.speed.runner._turn", interrupt)
        assert "run the same command to resume" in run("evaluate", saved[1], *options, code=130).stderr
    output = run("evaluate", saved[1], *options).stdout
    assert "| domain | prompt lookup | quadratic, k=1 | quadratic, k=3 |" in output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"results.json", "table.md", "curves.png", "curves.svg"}
    document = (tmp_path / "out" / "results.json").read_text()
    alone = run("evaluate", saved[1], *options, "--json", "-")
    assert alone.stdout == document and "| domain |" in alone.stderr
    output = run("evaluate", saved[1], *options, "--json", str(tmp_path / "copy.json")).stdout
    assert (tmp_path / "copy.json").read_text() == document and "| domain |" in output
    error = run("evaluate", saved[1], *options, "--batch-size", "2", code=1).stderr
    assert "contains the results of a different run: batch_size was 1, but is now 2" in " ".join(error.split())


def interrupt(*args):
    raise KeyboardInterrupt


def test_evaluate_completes_the_card(saved, prompts, tmp_path):
    adapter = shutil.copytree(saved[1], tmp_path / "adapter")
    options = ("--suite", prompts, "--strategies", "linear", "--output", str(tmp_path / "out"), *SHORT)
    run("evaluate", saved[0], "--adapter", str(adapter), "--card", *options)
    assert "## Evaluation" in (adapter / "README.md").read_text()
    assert "is not a folder" in run("evaluate", "me/adapter", "--card", code=2).stderr


def test_evaluate_says_so_where_matplotlib_is_missing(saved, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mtp.base.plotting.can_draw", lambda: False)
    monkeypatch.setattr("hf_mtp.evaluation.speed.report.can_draw", lambda: False)
    options = ("--suite", prompts, "--strategies", "linear", "--output", str(tmp_path / "out"), *SHORT)
    assert "no curves: matplotlib is not installed" in run("evaluate", saved[1], *options).stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "table.md"}


def test_probe_writes_everything(saved, prompts, tmp_path):
    base, adapter = saved
    output = run("probe", base, "--adapter", adapter, "--suite", prompts, "--output", str(tmp_path / "out"), *SHORT)
    assert "| masks | " in output.stdout and "the best placeholder" in output.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "probe.json",
        "probe.md",
        *(f"{name}.{kind}" for name in ("heatmap", "histogram") for kind in ("png", "svg")),
    }
    again = ("probe", base, "--suite", prompts, "--output", str(tmp_path / "out"), *SHORT)
    assert "contains the results of a different run: adapter was" in " ".join(run(*again, code=1).stderr.split())


def test_probe_takes_a_base_alone_and_says_so_where_matplotlib_is_missing(saved, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mtp.base.plotting.can_draw", lambda: False)
    monkeypatch.setattr("hf_mtp.evaluation.ranks.report.can_draw", lambda: False)
    output = run("probe", saved[0], "--suite", prompts, "--output", str(tmp_path / "out"), *SHORT).stdout
    assert "| newline | " not in output and "| masks | " not in output and "| mean embedding | " in output
    assert "no figures: matplotlib is not installed" in output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"probe.json", "probe.md"}


def test_numbers_must_be_numbers(saved):
    assert "--k takes integers" in run("evaluate", saved[1], "--k", "one", code=2).stderr


# ---------------------------------------------------------------- generate, chat, train, push

SPOKEN = "w6 w9 w12"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    """A random adapter on a random base, with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("cli")
    base = tiny_base("llama", torch.float64, max_position_embeddings=512)
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    upgraded(AutoModelForCausalLM.from_pretrained(folder / "base")).save_pretrained(folder / "adapter")
    return str(folder / "adapter")


@pytest.fixture(scope="module")
def session_of(adapter):
    """Makes sessions with one model."""
    model = load_model(adapter)
    return lambda **settings: Session(model, load_tokenizer(adapter), max_new_tokens=12, do_sample=False, **settings)


def continued(session: Session, ids: list[int], **settings) -> str:
    output = session.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, **settings)
    return session.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def test_generate_prints_the_text_of_plain_decoding(adapter, session_of, tmp_path):
    session = session_of()
    text = continued(session, session.tokenizer(SPOKEN).input_ids)
    options = (adapter, "--max-new-tokens", "12")
    result = run("generate", *options, SPOKEN)
    assert result.stdout == text + "\n"
    assert "12 tokens in" in result.stderr and "tokens/s" in result.stderr
    (tmp_path / "prompt.txt").write_text(SPOKEN)
    assert run("generate", *options, "--file", str(tmp_path / "prompt.txt")).stdout == text + "\n"
    assert run("generate", *options, input=SPOKEN).stdout == text + "\n"
    report = json.loads(run("generate", *options, "--json", "--plain", SPOKEN).stdout)
    assert (report["text"], report["tokens"], report["forward_passes"]) == (text, 12, 12)


def test_generate_samples_by_seed(adapter):
    options = ("generate", adapter, SPOKEN, "--max-new-tokens", "12", "--temperature", "1.0")
    texts = [run(*options, "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_generate_takes_one_prompt(adapter, tmp_path):
    (tmp_path / "prompt.txt").write_text(SPOKEN)
    assert (
        "Pass only one of them" in run("generate", adapter, "x", "--file", str(tmp_path / "prompt.txt"), code=2).stderr
    )


def test_a_conversation_reads_nothing_twice(session_of):
    session, seen = session_of(suppress_tokens=[*range(6)]), []  # so that an answer reads as it was written
    read = session.model.get_base_model().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        for turn, text in enumerate(("w6 w7", "w8", "w9 w10")):
            seen.clear()
            answer = session.say(text, lambda piece: None)
            if turn:
                assert seen[0] <= 8  # the end of the last answer and the new message
    finally:
        read.remove()
    assert answer.text == session.messages[-1]["content"]
    chat = session.tokenizer.apply_chat_template(session.messages[:-1], add_generation_prompt=True, return_dict=True)
    assert answer.text == continued(session, chat["input_ids"], suppress_tokens=[*range(6)])
    session.clear()
    assert session.messages == []


@pytest.mark.parametrize("change", ["w90 w6", "w6 w9 w12 w90"])
def test_a_text_that_differs_from_the_last_one_is_read_from_there(session_of, change):
    session = session_of()
    session.complete(session.tokenizer(SPOKEN).input_ids, lambda piece: None)
    ids = session.tokenizer(change).input_ids
    assert session.complete(ids, lambda piece: None).text == continued(session, ids)


@pytest.mark.parametrize("plain", [False, True])
def test_pieces_are_the_tokens_of_one_pass(session_of, plain):
    session, pieces = session_of(plain=plain, strategy="quadratic"), []
    answer = session.complete(session.tokenizer(SPOKEN).input_ids, pieces.append)
    assert "".join(pieces) == answer.text
    lengths = [len(piece.split()) for piece in pieces]
    assert len(pieces) <= answer.forward_passes and sum(lengths) <= answer.tokens == 12
    assert max(lengths) == 1 if plain else sum(lengths) - len(lengths) <= answer.accepted


def test_an_interrupted_answer_is_forgotten(session_of):
    session = session_of()
    session.say("w6", lambda piece: None)
    before = list(session.messages)

    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.say("w7", interrupt)
    assert session.messages == before
    chat = [*before, {"role": "user", "content": "w8"}]
    ids = session.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert session.say("w8", lambda piece: None).text == continued(session, ids)


def test_chat_answers_until_exit(adapter, session_of):
    typed = "w6 w7\n/plain\nw8\n/clear\n/what\n/exit\n"
    shown = run("chat", adapter, "--max-new-tokens", "12", input=typed).stdout
    answer = session_of().say("w6 w7", lambda piece: None)
    assert answer.text in shown and shown.count("x plain decoding") == 2
    assert "Plain decoding runs at" in shown and "One token per pass." in shown


def test_train_writes_an_adapter(adapter, tmp_path, monkeypatch):
    trainers, left = [], []
    make = MTPTrainer.__init__
    monkeypatch.setattr(
        MTPTrainer, "__init__", lambda self, **options: trainers.append(weakref.ref(self)) or make(self, **options)
    )
    # The process group is destroyed then, unless a trainer still holds it.
    monkeypatch.setattr(Accelerator, "end_training", lambda self: left.append(trainers[-1]()))
    base = adapter.replace("adapter", "base")
    rows = [{"text": words(20, start)} for start in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"model": base, "k": 2, "r": 4, "max_steps": 1, "report_to": "none", "bf16": False, "use_cpu": True}
    settings |= {"save_steps": 1, "logging_steps": 1}
    (tmp_path / "train.yaml").write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in settings.items()))
    options = ("--config", str(tmp_path / "train.yaml"), "--dataset", str(tmp_path / "rows.jsonl"))
    out = str(tmp_path / "out")
    assert f"hf-mtp generate {out}" in run("train", *options, "--output_dir", out, "--k", "3").stdout
    assert load_model(out).base_model.active_mtp_config.k == 3
    run("train", *options, "--output_dir", out, "--k", "3", "--max_steps", "2", "--resume_from_checkpoint", "true")
    state = json.loads(Path(out, "checkpoint-2", "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [1, 2]  # the first is of the training before
    run("train", *options, "--output_dir", f"{out}-noise", "--masks", "noise", "--no_sampler")
    config = load_model(f"{out}-noise").base_model.active_mtp_config
    assert (config.k, config.masks, config.sampler) == (2, "noise", False)
    assert left == [None] * 3


def test_train_refuses_unknown_fields_and_lists_known_ones(adapter):
    assert "--nonsense" in run("train", "--model", adapter, "--dataset", "x", "--nonsense", "3", code=2).stderr
    assert "--masks_per_part" in run("train", "--list-fields").stdout


def test_push_uploads_the_adapter_and_prints_where(adapter, monkeypatch):
    calls = []

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **settings):
            calls.append((repo_id, settings["private"]))
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, *_, **__):
            return False

        def create_commit(self, repo_id, operations, **settings):
            calls.append(({operation.path_in_repo for operation in operations}, settings["commit_message"]))
            return SimpleNamespace(pr_url=None, commit_url="https://hub/commit/1")

    monkeypatch.setattr("hf_mtp.adapter.hub.HfApi", Api)
    result = run("push", adapter, "me/it", "--private", "--message", "First")
    assert result.stdout == "https://hub/commit/1\n"
    assert calls[0] == ("me/it", True) and calls[1][1] == "First"
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} == calls[1][0]


def test_push_passes_its_options_on(adapter, monkeypatch):
    calls = []

    def push_to_hub(self, repo_id, **settings):
        calls.append(settings)
        return SimpleNamespace(pr_url="https://hub/discussions/1", commit_url="https://hub/commit/1")

    monkeypatch.setattr("hf_mtp.adapter.hub.PeftModelForCausalLM.push_to_hub", push_to_hub)
    result = run("push", adapter, "me/it", "--custom-generate", "--create-pr", "--revision", "trial")
    assert result.stdout == "https://hub/discussions/1\n"
    wanted = {"custom_generate": True, "create_pr": True, "revision": "trial", "card_from": adapter}
    assert wanted.items() <= calls[0].items()


def test_push_needs_an_adapter(script, adapter):
    result = script("push", adapter.replace("adapter", "base"), "me/it")
    assert result.returncode == 1 and "is not an adapter: it has no adapter_config.json" in result.stderr
