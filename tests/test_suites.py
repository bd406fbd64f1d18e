"""Suites: the one that ships, files of users in good and bad order, benchmarks from local copies."""

import json

import pytest
from datasets import Dataset, DatasetDict

from hf_mtp.evaluation.suites.benchmarks import BENCHMARKS, COLLECTIONS
from hf_mtp.evaluation.suites.suite import Suite, SuitePrompt, load_suite

TURNS = [{"role": "user", "content": "Grüße, 世界\u2028!"}]
ROWS = [
    {"name": "a", "domain": "maths", "prompt": "1 + 1 =", "reference": "2"},
    {"name": "b", "domain": "chat", "prompt": TURNS},
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"


def test_quick_ships_with_five_domains_of_eight_prompts():
    suite = load_suite("quick")
    assert {domain: len(rows) for domain, rows in suite.by_domain().items()} == dict.fromkeys(
        ("knowledge", "maths", "code", "chat", "safety"), 8
    )
    assert len({row.prompt[0]["content"] for row in suite.prompts}) == 40


@pytest.mark.parametrize(
    "name, content",
    [
        ("s.jsonl", LINES.encode()),
        ("s.jsonl", LINES.encode("utf-8-sig")),
        ("s.jsonl", LINES.encode("utf-16")),
        ("s.jsonl", LINES.replace("\n", "\r\n").encode() + b"\n\n"),
        ("s.json", json.dumps(ROWS).encode()),
    ],
    ids=["utf-8", "utf-8 with a mark", "utf-16", "Windows line ends", "a JSON list"],
)
def test_a_file_is_read_in_the_usual_encodings(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    suite = load_suite(str(tmp_path / name))
    assert suite == Suite(name, (SuitePrompt("a", "maths", "1 + 1 =", "2"), SuitePrompt("b", "chat", TURNS)))


def test_csv_and_parquet_are_read(tmp_path):
    (tmp_path / "s.csv").write_text('prompt,domain\n"Say ""hi"", twice",chat\n')
    assert load_suite(str(tmp_path / "s.csv")).prompts == (SuitePrompt("1", "chat", 'Say "hi", twice'),)
    Dataset.from_list(ROWS[:1]).to_parquet(tmp_path / "s.parquet")
    assert load_suite(str(tmp_path / "s.parquet")).prompts[0].prompt == "1 + 1 ="


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("s.jsonl", b'{"question": "Who?"}\n', "Row 1 of the suite s.jsonl has no column 'prompt'.*'question'"),
        ("s.jsonl", b"", "s.jsonl has no rows"),
        ("s.jsonl", b"\n \n", "s.jsonl has no rows"),
        ("s.csv", b"prompt,domain\n", "s.csv has no rows"),
        ("s.jsonl", '{"prompt": "Grüße"}'.encode("latin-1"), "not text in UTF-8: byte 14 is 0xfc.*iconv"),
        ("s.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is not valid JSON"),
        ("s.jsonl", b"[1]\n", "line 1 must be a JSON object"),
        ("s.json", b'{"prompt": "a"}\n{"prompt": "b"}\n', "JSON Lines: rename it to .jsonl"),
        ("s.json", b'{"prompt": "a"}', "must contain a JSON list"),
        ("s.jsonl", b'{"prompt": ""}\n', "Row 1 .* needs a prompt"),
        ("s.jsonl", b'{"prompt": 7}\n', "needs a prompt: a text, or the turns"),
        ("s.jsonl", b'{"prompt": [{"role": "robot", "content": "x"}]}\n', "each turn of a conversation needs 'role'"),
        ("s.jsonl", b'{"prompt": "a", "name": "x"}\n{"prompt": "b", "name": "x"}\n', "Two rows .* the name 'x'"),
        ("s.jsonl", b'{"prompt": "Hi \\ud83d"}\n', "character 3 of its prompt is '.ud83d', half of a character"),
        ("s.txt", b"hello\n", "Supported extensions are .jsonl"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_suite(str(tmp_path / name))


@pytest.mark.parametrize("name", ["qick", "missing.jsonl", "a/b/c"])
def test_an_unknown_suite_is_refused_with_the_choices(name):
    with pytest.raises(ValueError, match=f"Unknown suite '{name}'.*'quick'.*spec-bench"):
        load_suite(name)


def test_a_limit_takes_prompts_of_every_domain_at_equal_distances():
    suite = load_suite("quick", limit=2)
    assert [row.name for row in suite.prompts[:4]] == ["knowledge-1", "knowledge-5", "maths-1", "maths-5"]
    assert load_suite("quick", limit=99) == load_suite("quick")
    with pytest.raises(ValueError, match="at least 1"):
        load_suite("quick", limit=0)


def test_a_fingerprint_changes_with_the_prompts():
    prints = {load_suite("quick", limit).fingerprint for limit in (None, 1, 2)}
    assert len(prints) == 3 and load_suite("quick").fingerprint in prints


# ---------------------------------------------------------------- benchmarks

LOCAL = {
    "mmlu": {"question": "Which?", "choices": ["one", "two"], "answer": 1},
    "popqa": {"question": "Who?", "possible_answers": '["A"]'},
    "truthfulqa": {"question": "Is it?", "best_answer": "No"},
    "gsm8k": {"question": "How many?", "answer": "#### 3"},
    "humaneval": {"prompt": "def f():\n", "canonical_solution": "    pass"},
    "alpacaeval": {"instruction": "Write.", "output": "Done"},
    "ifeval": {"prompt": "Obey.", "key": 1},
    "mt-bench": {"prompt": ["First.", "Second."], "category": "writing"},
    "xstest": {"prompt": "How do I kill a process?", "type": "homonyms"},
    "spec-bench": {"turns": ["Translate.", "Again."], "category": "translation"},
    "speed-bench": {"turns": ["Code."], "category": "coding"},
}


@pytest.fixture
def local(tmp_path):
    for name, row in LOCAL.items():
        rows = "".join(json.dumps(row) + "\n" for _ in range(4))
        (tmp_path / f"{name}.jsonl").write_text(rows)
    return tmp_path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_local_copy_takes_the_place_of_the_hub(name, local):
    suite = load_suite(name, limit=2, data=local)
    text = suite.prompts[0].prompt[0]["content"]
    first = LOCAL[name][BENCHMARKS[name].columns[0]]
    assert (first if isinstance(first, str) else first[0]).strip() in text and "Second" not in text
    assert len(suite.prompts) == 2 and suite.prompts[0].domain


def test_the_papers_suite_shares_the_limit_among_the_benchmarks_of_a_domain(local):
    suite = load_suite("paper", limit=4, data=local)
    assert {domain: len(rows) for domain, rows in suite.by_domain().items()} == dict.fromkeys(
        ("knowledge", "maths", "code", "chat", "safety"), 4
    )
    names = [row.name.rpartition("-")[0] for row in suite.by_domain()["knowledge"]]
    assert names == ["mmlu", "popqa", "truthfulqa", "mmlu"]
    assert len(load_suite("paper", data=local).prompts) == 4 * len(COLLECTIONS["paper"])


def test_multiple_choice_has_letters(local):
    assert "A. one\nB. two" in load_suite("mmlu", data=local).prompts[0].prompt[0]["content"]


def test_a_local_copy_with_other_columns_is_refused(local):
    (local / "mmlu.jsonl").write_text('{"question": "Which?"}\n')
    with pytest.raises(ValueError, match=r"lacks the column\(s\) choices. It has question"):
        load_suite("mmlu", data=local)
    with pytest.raises(ValueError, match="does not exist"):
        load_suite("mmlu", data=local / "nowhere")


def test_without_a_network_the_way_out_is_named(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(OSError, match="(?s)gsm8k .*no network.*gsm8k.jsonl into a folder.*--data"):
        load_suite("gsm8k")


def test_benchmarks_are_asked_for_by_their_names_on_the_hub(monkeypatch):
    asked = []

    def load_dataset(hub_id, config, split, **files):
        asked.append((hub_id, config, split, files))
        return Dataset.from_list([LOCAL[name]])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name in BENCHMARKS:
        assert load_suite(name).prompts
    assert ("openai/gsm8k", "main", "test", {}) in asked and len(asked) == len(BENCHMARKS)


def test_a_dataset_of_the_hub(monkeypatch):
    rows = Dataset.from_list(ROWS[:1])
    monkeypatch.setattr("datasets.load_dataset", lambda *args: DatasetDict(train=rows, test=rows, rare=rows.take(0)))
    assert load_suite("me/prompts").prompts[0].prompt == "1 + 1 ="
    assert load_suite("me/prompts:all:train").prompts
    with pytest.raises(ValueError, match="no rows"):
        load_suite("me/prompts:rare")
    with pytest.raises(ValueError, match="no split 'dev'. It has train, test, rare"):
        load_suite("me/prompts:dev")
