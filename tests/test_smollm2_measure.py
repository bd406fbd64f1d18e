"""`examples/smollm2/measure.py`: every method on the same prompts in turn, and tables from what it writes."""

import json
import shutil
import sys
from importlib import import_module as script
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from scripts import importable
from transformers import AutoModelForCausalLM

from hf_mtp import GatedLoraConfig
from hf_mtp.data.ngram_counts import count_tokens
from hf_mtp.evaluation.run import adapter_fingerprint

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE, DOCS = ROOT / "examples" / "smollm2", ROOT / "docs"
BASE = ROOT / "examples" / "quickstart" / "base"
TEXTS = {"maths": "2 + 2?", "code": "Sort a list.", "chat": "Hello!"}
BEST = {"prompt lookup": "5 tokens, n-grams up to 3", "early exit": "layer 10, 2 tokens", "small draft": "6 tokens"}


@pytest.fixture(autouse=True)
def _importable():
    with importable(EXAMPLE, DOCS):
        yield


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter for the quickstart's base that was never trained."""
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    torch.manual_seed(0)
    get_peft_model(base, GatedLoraConfig(k=8, r=2)).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Held-out sets of a few texts."""
    rows = {
        "gsm8k_test": [{"question": f"{number} + {TEXTS['maths']}"} for number in range(6)],
        "mbpp": [{"task_id": number, "text": f"{TEXTS['code']} {number}"} for number in range(1, 7)],
        "chat_test": [{"prompt": f"{TEXTS['chat']} {number}"} for number in range(6)],
    }
    for name, texts in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    return tmp_path


@pytest.fixture
def run(data, adapter, monkeypatch):
    """Runs the script, and returns its report."""

    def run(experiment: str, *arguments: str, base: Path = BASE) -> dict:
        output = data / f"{experiment}.json"
        command = [experiment, data, output, "--base", base, "--adapter", adapter, "--threads", 1, *arguments]
        monkeypatch.setattr(sys, "argv", ["measure.py", *map(str, command)])
        monkeypatch.setattr(script("paired"), "WARM_UP_TOKENS", 2)
        script("measure").main()
        return json.loads(output.read_text(encoding="utf-8"))

    return run


# ---------------------------------------------------------------- what is measured


def test_every_method_decodes_the_same_prompts_and_gives_the_same_text(run, data, monkeypatch):
    measure = script("measure")
    (data / "peers.json").write_text(json.dumps({"best": BEST}))
    speed = measure.Experiment(measure.speed_methods, measure.held_out, prompts=2, dtype="float32")
    monkeypatch.setitem(measure.EXPERIMENTS, "speed", speed)
    # The small draft model is the base of these tests, so transformers refuses a second tokenizer.
    options = property(lambda models: {"assistant_model": models.small_draft})
    monkeypatch.setattr(measure.Models, "small_draft_options", options)
    report = run("speed", "--peers", str(data / "peers.json"), "--rare", "1", "--new-tokens", "8")
    assert {*report["domains"]} == {"maths", "code", "chat"} and report["dtype"] == "float32"
    for methods in report["domains"].values():
        assert {name: row["prompts"] for name, row in methods.items()} == {
            **dict.fromkeys(("plain", "auto", "auto, bitwise", "prompt lookup"), 2),
            **dict.fromkeys(("quadratic", "linear", "early exit", "small draft"), 1),
            **dict.fromkeys(("auto, untrained adapter", "plain, in a batch"), 1),
        }
        assert all(row["identical"] == row["prompts"] == len(row["speedups"]) for row in methods.values())
        assert methods["plain"]["tokens_per_pass"] == 1


def test_batches_hold_different_prompts_and_end_separately(run, monkeypatch):
    measure = script("measure")
    batches = measure.Experiment(measure.just(auto=measure.mtp()), measure.batches, prompts=1, dtype="float32")
    monkeypatch.setitem(measure.EXPERIMENTS, "batches", batches)
    report = run("batches", "--new-tokens", "6")
    assert {name: methods["auto"]["prompts"] for name, methods in report["domains"].items()} == {
        "batch of 4": 4,
        "batch of 8": 8,
    }
    assert all(methods["auto"]["identical"] == methods["auto"]["prompts"] for methods in report["domains"].values())


def test_a_report_names_the_adapter_as_an_evaluation_does(run, adapter):
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64)
    assert run("tokens", "--small")["adapter"] == adapter_fingerprint(PeftModel.from_pretrained(base, adapter))


def test_sampling_is_compared_with_greedy_decoding(run):
    report = run("temperatures", "--small")
    for methods in report["domains"].values():
        assert len(methods) == 9 and all(
            row["tokens_per_pass"] >= 1 and "identical" not in row for row in methods.values()
        )
    assert report["methods"]["auto, T = 0.7"]["temperature"] == 0.7 and report["methods"]["auto, T = 0.7"]["do_sample"]


def test_masks_and_the_table_are_measured_one_without_the_other(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    count_tokens([[5, 6, 7]] * 2).save(tmp_path / "adapter")
    models = script("methods").Models(str(BASE), tmp_path / "adapter", "float32")
    have_table = {"adapter": True, "without_table": False, "table_alone": True, "untrained": False}
    assert {name: bool(getattr(models, name).active_peft_config.ngrams) for name in have_table} == have_table


def test_assumed_costs_are_never_measured(adapter):
    methods = script("methods")
    model = methods.Models(str(BASE), adapter, "float32").free_columns
    inputs = {"input_ids": torch.arange(12)[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    model.generate(**inputs, mtp=True, do_sample=False, max_new_tokens=12)
    (key,) = model.base_model.schedules._known
    schedule = model.base_model.schedules.borrow(key, make=None)
    assert schedule.costs == methods.NEARLY_FREE and schedule.mask_acceptance.counts.offered[0] > 2


def test_what_was_measured_is_not_measured_again(run, data, monkeypatch):
    paired = script("paired")
    done, one_turn = [], paired.one_turn

    def interrupted(models, methods, texts, turn, new_tokens):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(texts)
        return one_turn(models, methods, texts, turn, new_tokens)

    monkeypatch.setattr(paired, "one_turn", interrupted)
    arguments = ("tokens", "--prompts", "2", "--new-tokens", "4")
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    assert not (data / "tokens.json").exists() and (data / ".tokens.json.part").exists()
    first, done[:] = [*done], []
    report = run(*arguments)
    assert len(report["rows"]) == 6 and len(done) == 2 and all(texts not in first for texts in done)
    assert len((data / "tokens.json").read_text().split('{"domain": ')) == 7  # a line for each row
    assert not (data / ".tokens.json.part").exists()


def test_other_settings_start_anew(tmp_path, capsys):
    paired = script("paired")
    row = {"domain": "maths", "turn": 0, "answers": {}}
    paired.Record(tmp_path / "some.json", {"new_tokens": 4}).add(row)
    assert paired.Record(tmp_path / "some.json", {"new_tokens": 4}).has("maths", 0)
    assert not paired.Record(tmp_path / "some.json", {"new_tokens": 5}).has("maths", 0)
    assert "other settings" in capsys.readouterr().out


def test_the_clock_ends_a_measurement_between_turns(run, data, monkeypatch):
    paired = script("paired")
    clock = iter([0.0, 0.0, 59.0, 61.0])
    fake = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(paired, "time", fake)
    report = run("tokens", "--prompts", "4", "--new-tokens", "4", "--minutes", "1")
    assert [(row["domain"], row["turn"]) for row in report["rows"]] == [
        (domain, turn) for turn in (0, 1) for domain in ("maths", "code", "chat")
    ]
    assert (data / ".tokens.json.part").exists()  # a later call can go on


def test_methods_take_turns_in_coming_first():
    paired, methods = (script(name) for name in ("paired", "methods"))
    order = []

    class Models:
        base = SimpleNamespace(device="cpu")

        def tokenizer(self):
            return None

        def decode(self, method, inputs, new_tokens):
            order.append(method.options["name"])
            return [[1, 2]], 2, 0.5

    some = {name: methods.Method(options={"name": name}) for name in ("plain", "a", "b")}
    paired.encoded = lambda texts, models: {}
    for turn in range(3):
        paired.one_turn(Models(), some, ["text"], turn, 2)
    assert order == ["plain", "a", "b", "a", "b", "plain", "b", "plain", "a"]


def test_a_gap_is_in_units_of_rounding():
    paired = script("paired")
    logits = torch.tensor([[[10.0, 9.875, 3.0]]], dtype=torch.bfloat16)  # between 8 and 16 bfloat16 rounds to 1/16
    read = []

    class Base(torch.nn.Module):
        def get_input_embeddings(self):
            return torch.nn.Embedding(9, 1)

        def forward(self, ids, logits_to_keep):
            read.append(ids.tolist())
            return SimpleNamespace(logits=logits)

        def generate(self, ids, **options):
            return SimpleNamespace(scores=[logits[0]])

    base = Base()
    assert paired.gap(base, torch.tensor([7, 8]), [5, 0, 2], [5, 1, 2]) == 2.0
    assert read == [[[7, 8, 5]]]
    assert paired.gap(base, torch.tensor([7]), [5, 0], [5]) is None


def test_speed_is_the_median_of_seconds_per_token():
    paired = script("paired")

    def turn(turn: int, seconds: float, tokens: int) -> dict:
        common = {"rows": 1, "passes": 10, "repeated_4grams": 0.0, "identical": 1, "gaps": []}
        answers = {
            "plain": {"tokens": 10, "seconds": 1.0} | common,
            "a": {"tokens": tokens, "seconds": seconds} | common,
        }
        return {"domain": "maths", "turn": turn, "answers": answers}

    rows = [turn(0, 0.5, 10), turn(1, 0.5, 5), turn(2, 0.25, 10)]
    assert paired.summarize(rows)["maths"]["a"]["speedups"] == [2.0, 1.0, 4.0]
    assert paired.summarize(rows)["maths"]["a"]["speedup"] == 2.0


def test_the_best_setting_is_the_fastest_over_all_domains():
    measure = script("measure")
    domains = {
        domain: {
            f"{family}: {setting}": {"speedup": 2.0 if setting == BEST[family] else 1.9 if domain == "code" else 1.0}
            for family, settings in measure.PEERS.items()
            for setting in settings
        }
        for domain in TEXTS
    }
    domains["maths"]["prompt lookup: 3 tokens, n-grams up to 2"]["speedup"] = 2.5
    assert measure.best_of("peers", domains) == {"best": BEST}


def test_errors_are_one_paragraph(run, data, tmp_path):
    with pytest.raises(SystemExit, match=r"none.json is missing. Measure `peers` first"):
        run("speed", "--peers", str(tmp_path / "none.json"))
    with pytest.raises(SystemExit, match=r"^OSError: .*nowhere"):
        run("tokens", base=tmp_path / "nowhere")
    with pytest.raises(SystemExit, match=r"^ValueError: This adapter was trained .*SmolLM2-135M-Instruct"):
        run("tokens", "--adapter", str(EXAMPLE / "adapter"))


# ---------------------------------------------------------------- tables


def report_of(methods: dict[str, float], domains=("maths", "code", "chat")) -> dict:
    """A report in which methods have these speeds, and as many tokens per pass."""
    machine = {"processor": "Some CPU", "threads": 2, "python": "3.12"}
    machine["versions"] = dict.fromkeys(("torch", "transformers", "peft", "trl"), "1.0")
    rows = {
        name: {"prompts": 2, "identical": 1, "speedup": speed, "speedups": [speed, speed], "tokens_per_pass": speed}
        for name, speed in methods.items()
    }
    answers = {name: {"rows": 2, "gaps": [1.0 if name == "auto" else 0.5]} for name in methods}
    return {
        "machine": machine,
        "dtype": "bfloat16",
        "new_tokens": 128,
        "methods": dict.fromkeys(methods),
        "domains": dict.fromkeys(domains, rows),
        "rows": [{"domain": domain, "turn": 0, "answers": answers} for domain in domains],
    }


def by_k_report() -> dict:
    methods = {
        f"{s}, k={k}": 1 + i + k / 10 for i, s in enumerate(("linear", "quadratic", "auto")) for k in (1, 2, 4, 8)
    }
    return report_of({"plain": 1.0, **methods}, ("knowledge", "maths", "code", "chat", "safety"))


SPEEDS = {
    "plain": 1.0,
    "auto": 2.0,
    "auto, bitwise": 1.75,
    "quadratic": 3.0,
    "prompt lookup": 1.6,
    "early exit": 0.5,
    "small draft": 1.25,
}
PEER_SPEEDS = {"plain": 1.0, "prompt lookup: 5 tokens": 1.5, "prompt lookup: 8 tokens": 1.75}
AUTO = {"plain": 1.0, "auto": 2.0}
WARM = {f"{s}, {t}": 2.0 if t == "greedy" else 1.5
        for s in ("quadratic", "auto") for t in ("greedy", "T = 0.7", "T = 1.0")}  # fmt: skip


@pytest.mark.parametrize(
    "table, file, report, row",
    [
        (
            "smollm2",
            "smollm2",
            report_of(SPEEDS),
            "| chat | 2.00 | **2.00x** | 1.25x (prompt lookup) | 1/2, 1/2 | 1.75x, 1/2 |",
        ),
        ("smollm2_methods", "smollm2", report_of(SPEEDS), "| chat | early exit | 0.50x | – | 1/2 |"),
        ("divergences", "smollm2", report_of(SPEEDS), "| auto | 3 of 6 | 1.0 |"),
        (
            "peers",
            "peers",
            report_of(PEER_SPEEDS) | {"best": {"prompt lookup": "8 tokens"}},
            "| prompt lookup | 8 tokens | 2 | 1.75x | 1.75x | 1.75x |",
        ),
        ("by_k", "by_k", by_k_report(), "| safety | auto | 3.10, 3.10x | 3.20, 3.20x | 3.40, 3.40x | 3.80, 3.80x |"),
        (
            "batches",
            "batches",
            report_of({"plain": 1, "auto": 2}, ["batch of 4"]),
            "| batch of 4 | 2.00x | 2.00 | 1/2 |",
        ),
        (
            "temperatures",
            "temperatures",
            report_of(WARM),
            "| chat | auto | 2.00 | 1.50 (0.75) | 1.50 (0.75) |",
        ),
        ("in_float32", "float32", report_of(AUTO), "| chat | 1/2 | 2.00x |"),
    ],
)
def test_tables_show_what_was_measured(table, file, report, row, tmp_path, monkeypatch):
    monkeypatch.setattr(script("tables"), "RESULTS", tmp_path)
    (tmp_path / f"{file}.json").write_text(json.dumps(report), encoding="utf-8")
    lines = script("make_tables").fill(table).splitlines()
    assert row in lines and any("Some CPU, 2 threads, Python 3.12" in line for line in lines)
    (tmp_path / f"{file}.json").unlink()
    assert script("make_tables").fill(table) == "Not measured yet.\n"


def test_curves_by_k_can_be_drawn(tmp_path, monkeypatch):
    from matplotlib.image import imread

    monkeypatch.syspath_prepend(str(DOCS / "figures"))
    (tmp_path / "by_k.json").write_text(json.dumps(by_k_report()), encoding="utf-8")
    script("draw_by_k").main(tmp_path, tmp_path)
    pixels = imread(tmp_path / "by_k.png")
    for red, green, blue in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0, 0x9E, 0x73)):  # linear, quadratic, auto
        assert (abs(pixels[..., :3] * 255 - (red, green, blue)).sum(axis=-1) < 8).sum() > 300
