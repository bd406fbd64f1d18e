"""lm-evaluation-harness: the scores and texts of an upgraded model are the base's, in fewer forward passes."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_base, upgraded
from tiny_text import tiny_tokenizer, words
from tiny_training import taught
from transformers import AutoModelForCausalLM

from hf_mtp import GatedLoraConfig
from hf_mtp.evaluation.decoded import counted_forward_passes

pytest.importorskip("lm_eval", reason="pip install lm_eval")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hf_mtp.evaluation import harness

ROOT = Path(__file__).resolve().parents[1]
NEW_TOKENS = 12
MTP = {"mtp": True, "mtp_strategy": "quadratic"}  # `auto` would decide by measured costs


@pytest.fixture(scope="module")
def model():
    return taught(upgraded("llama", 3), NEW_TOKENS).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """A folder with `base`, `adapter`, `lora` and a folder of tasks with their data."""
    path = tmp_path_factory.mktemp("harness")
    tiny_base("llama").save_pretrained(path / "base")
    tiny_tokenizer().save_pretrained(path / "base")
    model.peft_config["default"].base_model_name_or_path = str(path / "base")
    model.save_pretrained(path / "adapter")
    get_peft_model(tiny_base("llama"), LoraConfig(r=4, target_modules="all-linear")).save_pretrained(path / "lora")
    rows = [
        {"prompt": words(9, start), "choices": [f"w{7 + start}", f"w{40 - start}"], "label": start % 2}
        for start in range(4)
    ]
    (path / "tasks").mkdir()
    (path / "tasks" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for task in tasks(path):
        (path / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return path


def tasks(folder: Path) -> list[dict]:
    """A multiple-choice and a generative task on local data."""
    files = {"test": str(folder / "tasks" / "rows.jsonl")}
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
    }
    choices = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"}
    written = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["w11", "w50"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    return [{"task": "words_choices", **shared, **choices}, {"task": "words_written", **shared, **written}]


def scores(lm, folder: Path, gen_kwargs: dict | None = None, **options) -> tuple[dict, dict]:
    """The harness's scores, and each question's answers: log-likelihoods or a text."""
    found = simple_evaluate(
        lm,
        tasks=["words_choices", "words_written"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        gen_kwargs=gen_kwargs,
        bootstrap_iters=0,
        **options,
    )
    answers = {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}
    return found["results"], answers


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_model_object_scores_as_its_base_in_fewer_passes(model, folder, batch_size):
    passes, found = [], []
    for lm_model, gen_kwargs in ((model.get_base_model(), None), (model, MTP)):
        lm = HFLM(pretrained=lm_model, tokenizer=tiny_tokenizer(), batch_size=batch_size)
        with counted_forward_passes(model) as forward_passes:
            found.append(scores(lm, folder, gen_kwargs))
            passes.append(forward_passes())
    assert found[0] == found[1]
    assert all(len(text) > 0 for ((text,),) in found[0][1]["words_written"])
    assert passes[1] < passes[0]


def test_the_name_loads_base_and_adapter(model, folder):
    plain = HFLM(pretrained=model.get_base_model(), tokenizer=tiny_tokenizer())
    arguments = {"pretrained": str(folder / "base"), "adapter": str(folder / "adapter")}
    named = scores("hf-mtp", folder, MTP, model_args=arguments, device="cpu")
    assert named == scores(plain, folder)
    assert named[0]["words_choices"]["sample_len"] == 4


def test_an_adapter_alone_brings_its_base_and_passes_and_tokens_are_counted(folder):
    counts = []
    for gen_kwargs in (None, MTP):
        lm = harness.UpgradedLM(str(folder / "adapter"), device="cpu")
        scores(lm, folder, gen_kwargs)
        info = lm.get_model_info()
        counts.append((info["generated_forward_passes"], info["generated_tokens"]))
    (plain_passes, plain_tokens), (passes, tokens) = counts
    assert plain_passes == plain_tokens == tokens > passes


@pytest.mark.parametrize("named, asked, loaded", [(None, None, "main"), ("v1", None, "v1"), ("v1", "v2", "v2")])
def test_an_adapter_alone_brings_the_revision_of_its_base(named, asked, loaded, folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "revision": named}))
    calls = []
    monkeypatch.setattr(HFLM, "__init__", lambda self, *args, **kwargs: calls.append((args, kwargs)))
    harness.UpgradedLM(str(tmp_path / "adapter"), **({} if asked is None else {"revision": asked}))
    assert calls == [((str(folder / "base"),), {"revision": loaded})]


def test_a_vocabulary_that_is_larger_than_the_tokenizer_is_left_as_it_is(folder, tmp_path):
    base = tiny_base("llama", vocab_size=101)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    upgraded(base).save_pretrained(tmp_path / "adapter")
    lm = harness.UpgradedLM(str(tmp_path / "base"), str(tmp_path / "adapter"), device="cpu")
    assert lm.model.get_base_model().get_input_embeddings().num_embeddings == 101


def test_wrong_arguments_are_refused_in_words(folder):
    base, adapter, lora = (str(folder / name) for name in ("base", "adapter", "lora"))
    with pytest.raises(ValueError, match="Pass its adapter as well"):
        harness.UpgradedLM(base, device="cpu")
    with pytest.raises(ValueError, match="takes its adapter as `adapter`"):
        harness.UpgradedLM(base, peft=adapter, device="cpu")
    with pytest.raises(ValueError, match="has no adapter of hf_mtp"):
        harness.UpgradedLM(base, lora, device="cpu")


def test_the_command_of_the_harness_knows_the_name(folder, tmp_path):
    command = [sys.executable, "-m", "hf_mtp.evaluation.harness", "--model", "hf-mtp", "--device", "cpu"]
    command += ["--model_args", f"pretrained={folder / 'base'},adapter={folder / 'adapter'}"]
    command += ["--tasks", "words_choices,words_written", "--include_path", str(folder / "tasks")]
    command += ["--gen_kwargs", "mtp=True,mtp_strategy=quadratic", "--output_path", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "words_choices" in result.stdout and "words_written" in result.stdout
    (written,) = tmp_path.rglob("results_*.json")
    info = json.loads(written.read_text(encoding="utf-8"))["config"]
    assert info["generated_forward_passes"] < info["generated_tokens"] <= 4 * NEW_TOKENS


def test_the_benchmark_finds_upgraded_models_unchanged_and_a_plain_lora_changed(tmp_path, monkeypatch):
    toy = ROOT / "examples" / "quickstart" / "base"
    base = AutoModelForCausalLM.from_pretrained(toy, dtype="auto")
    get_peft_model(base, GatedLoraConfig(k=4, r=4)).save_pretrained(tmp_path / "adapter")
    options = ["--base", str(toy), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out.json")]
    sizes = ["--texts", "2", "--questions", "2", "--steps", "1"]
    script = ROOT / "examples" / "benchmarks" / "quality.py"
    monkeypatch.setattr(sys, "argv", [str(script), *options, *sizes])
    monkeypatch.syspath_prepend(script.parent)
    runpy.run_path(str(script), run_name="__main__")
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    base, *upgraded, plain = report["models"]
    assert [row["name"] for row in upgraded] == ["upgraded", "upgraded, trained further"]
    assert upgraded[0]["adapter"] != upgraded[1]["adapter"]
    for row in upgraded:
        assert row["logits"] == {"equal": 2, "largest_difference": 0.0}
        for task, found in row["tasks"].items():
            assert found["changed"] == 0 and found["score"] == base["tasks"][task]["score"]
    assert plain["logits"]["equal"] == 0 and plain["tasks"]["choice"]["changed"] == 2
