"""Figures cannot drift: committed results follow the documented schema, and pages take their figures from them."""

import json
import pathlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripts import importable

from hf_mtp.evaluation import load_probe, load_results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
FILES = sorted(RESULTS.glob("*.json"))
SCHEMA = RESULTS / "README.md"
LOADERS = {"hf_mtp.evaluation/1": load_results, "hf_mtp.probe/1": load_probe}
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
FieldPath = tuple[str, ...]  # keys, with "[]" for the rows of a list


# ---------------------------------------------------------------- the schema of the results


def documented() -> dict[str, set[FieldPath]]:
    """The fields of each section of the page of schemas, by its title."""
    _, *sections = re.split(r"^## ", SCHEMA.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {section.partition("\n")[0]: set(documented_fields(section)) for section in sections}


def documented_fields(section: str) -> Iterator[FieldPath]:
    for row in re.findall(r"^\| (?!in |-)(.*) \|$", section, re.MULTILINE):
        parents, fields = (re.findall(r"`([^`]+)`", cell) for cell in row.split("|")[:2])
        for parent in parents or [""]:
            yield from (path_of(f"{parent}.{field}") for field in fields)


def path_of(name: str) -> FieldPath:
    """`rows[].domain` as `("rows", "[]", "domain")`."""
    return tuple(part for part in name.replace("[]", ".[]").split(".") if part)


def fields_of(content, path: FieldPath = ()) -> set[FieldPath]:
    """All fields of a document that are no containers. An empty container is its path and `...`."""
    if not isinstance(content, dict | list):
        return {path}
    items = content.items() if isinstance(content, dict) else (("[]", row) for row in content)
    return {field for key, value in items for field in fields_of(value, (*path, key))} or {(*path, "...")}


def agrees(field: FieldPath, pattern: FieldPath) -> bool:
    """Whether a pattern stands for a field, or begins as an empty container does."""
    if field[-1] == "...":
        field, pattern = field[:-1], pattern[: len(field) - 1]
    return len(field) == len(pattern) and all(
        wanted == key or (wanted[0] == "<" and key != "[]") for key, wanted in zip(field, pattern, strict=True)
    )


SECTIONS = documented()
EVERY_FILE = SECTIONS.pop("Every file")
KINDS = {name: title for title in SECTIONS for name in title.split(", ")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_result_has_the_documented_fields(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    if "schema" in content:
        LOADERS[content["schema"]](path)
        return
    assert path.name in KINDS, f"docs/results/README.md has no section for {path.name}: {sorted(fields_of(content))}"
    patterns = SECTIONS[KINDS[path.name]] | EVERY_FILE | {("reports", "[]", *field) for field in EVERY_FILE}
    unknown = [field for field in fields_of(content) if not any(agrees(field, pattern) for pattern in patterns)]
    assert not unknown, f"docs/results/README.md does not name these fields of {path.name}: {sorted(unknown)}"


@pytest.mark.parametrize("title", SECTIONS)
def test_every_documented_field_exists(title):
    assert SECTIONS[title]
    contents = [json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in title.split(", ")]
    found = set().union(*map(fields_of, contents))
    missing = [pattern for pattern in SECTIONS[title] if not any(agrees(field, pattern) for field in found)]
    assert not missing, f"No file of {title} has these fields: {sorted(missing)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_result_says_where_it_was_measured(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    reports = content.get("reports") or [content.get("settings", content) if "schema" in content else content]
    for report in reports:
        machine = report["machine"]
        assert machine["processor"] and machine["threads"] >= 1 and machine["python"]
        assert {"torch", "transformers", "peft"} <= set(machine["versions"])


# ---------------------------------------------------------------- the figures of the pages


@pytest.fixture
def docs_script():
    with importable(ROOT / "docs") as script:
        yield script


def test_pages_use_every_result(docs_script, monkeypatch):
    make_tables = docs_script("make_tables")
    read, read_text = set(), pathlib.Path.read_text
    monkeypatch.setattr(
        pathlib.Path, "read_text", lambda path, *args, **options: read.add(path) or read_text(path, *args, **options)
    )
    for page in PAGES:
        make_tables.filled((ROOT / page).read_text(encoding="utf-8"))
    drawn = "".join(read_text(path) for path in (ROOT / "docs" / "figures").glob("*.py"))
    unused = {path.name for path in set(FILES) - read if f"results/{path.name}" not in drawn}
    assert not unused, f"No table, number or picture of a page comes from these files: {sorted(unused)}"


# A number with a unit, or with decimals. Version numbers of three parts and names such as arXiv's are none.
FIGURE = re.compile(
    r"(?<![\w./-])(?:\d+(?:,\d{3})*(?:\.\d+)?"
    r"(?:x\b| ?%| (?:ms|s|seconds?|minutes?|hours?|[kMGT]i?B|tokens? (?:per|a) \w+)\b)|\d{1,3}\.\d+(?![\d.]))"
)
# What a script writes, examples, code, targets of links, and figures of others, which stand in rows with their source.
NOT_OURS = re.compile(
    r"<!-- (?:table|value): .*?<!-- end -->|^```.*?^```|^\|[^\n]*\]\(https?://[^\n]*$|`[^`\n]*`|\]\([^)]*\)",
    re.DOTALL | re.MULTILINE,
)
TARGET, SETTING, VERSION = "a target, not a result", "a setting, not a result", "a version"
ALLOWED = {
    "README.md": {
        "276 minutes on a CPU core": "sums of examples/smollm2/training/*.json, not measured again",
        "from PyPI (93 MB)": "the size of a download",
    },
    "docs/benchmarks.md": {
        "were 1.7x, 1.6x and 1.35x on": TARGET,
        "A further target was 1.15 times": TARGET,
        "The target was 1.1 times the speed": TARGET,
        "The target was 0.8 of the greedy tokens per pass": TARGET,
        "The target for 17 columns was 1.2 times": TARGET,
        "The data is 13 % maths, 13 % instructions and 74 % Python": SETTING,
        "The targets for this run: 2.5 tokens per pass": TARGET,
        "1.8 on held-out text for chat": TARGET,
        "The more ambitious target of 3.5 for maths": TARGET,
        "should be 1.3x the fastest baseline": TARGET,
        "should be at most 3 % slower": TARGET,
        "should be at least 0.5 on maths": TARGET,
        "should keep 0.8 of the tokens": TARGET,
        "Decays of 0.6, 0.8 and 0.9": SETTING,
        "Default: 0.8.": SETTING,
        "The target was a gain of 8 % on every domain": TARGET,
        "The allowed difference was 5 %": TARGET,
    },
    "docs/evaluation.md": {
        "It fails if p is 0.001 or less": SETTING,
        "A load average above 0.75": SETTING,
        "The harness (0.4.13)": VERSION,
    },
    "docs/serving.md": {"(2 MiB) for large data URLs": SETTING},
    "docs/how-it-works.md": {"below 1.5 % of the cost": SETTING},
    "docs/scale.md": {
        "second environment (3.3 GB)": "the size of a download",
        "vLLM 0.32 on a CPU": VERSION,
        "if no m saves 3 %": SETTING,
    },
    "docs/support.md": {"torch 2.13": VERSION, "transformers 5.24": VERSION},
    "docs/training.md": {
        "at most 1.5 times the memory": TARGET,
        "a GPU with 24 GB": "the size of a common GPU",
        "torch 2.11": VERSION,
    },
}


@pytest.mark.parametrize("page", PAGES)
def test_scripts_write_the_figures_of_a_page(page):
    text = " ".join(NOT_OURS.sub("", (ROOT / page).read_text(encoding="utf-8")).split())
    for fragment in ALLOWED.get(page, {}):
        assert fragment in text, f"{page} does not say {fragment!r} any more: take it out of ALLOWED."
        text = text.replace(fragment, "")
    found = [text[max(0, match.start() - 40) : match.end() + 20] for match in FIGURE.finditer(text)]
    assert not found, (
        f"{page} has figures that no script wrote: {found}. Write `<!-- value: PATH as FORM --><!-- end -->` and run "
        "docs/make_tables.py, or name the words in ALLOWED with the reason."
    )


@pytest.mark.parametrize("page", PAGES)
def test_a_number_of_a_sentence_begins_no_line(page):
    # A line that begins with a comment ends the paragraph, and is no Markdown.
    assert not re.search(r"^\s*<!-- value", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)


def test_a_number_of_a_sentence_follows_its_result(docs_script, monkeypatch):
    make_tables, tables = (docs_script(name) for name in ("make_tables", "tables"))
    monkeypatch.setattr(tables, "load", lambda name: {"rows": [{"name": "a", "n": 3}, {"name": "b c", "n": [4.0]}]})
    for path, form, shown in (
        ("any/rows/name=b c/n/0", "{:.1f}x", "4.0x"),
        ("any/rows/0/n over any/rows/1/n/0", "{:.0%}", "75%"),
    ):
        text = f"It is <!-- value: {path} as {form} -->old<!-- end --> times."
        assert make_tables.filled(text) == text.replace("old", shown)
