"""Pages: the written parts are up to date, examples are right, and links lead somewhere."""

import ast
import builtins
import dataclasses
import importlib
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from matplotlib.image import imread
from peft import get_peft_model
from tiny_models import CACHE
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_mtp
from hf_mtp.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "examples" / "quickstart" / "base"
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def test_written_pages_are_up_to_date():
    result = subprocess.run(
        [sys.executable, ROOT / "docs" / "make_tables.py", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("figure", ["mask", "ablation", "by_k", "probe"])
def test_figures_can_be_drawn_again(figure, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    runpy.run_path(str(ROOT / "docs" / "figures" / f"draw_{figure}.py"))["main"](tmp_path)
    drawn, committed = (imread(folder / f"{figure}.png") for folder in (tmp_path, ROOT / "docs" / "figures"))
    assert drawn.shape == committed.shape
    assert abs(drawn - committed).mean() < 0.02  # fonts differ from machine to machine


# ---------------------------------------------------------------- the site


def menu_pages(entry) -> list[str]:
    """The pages of an entry of the site's menu."""
    parts = entry if isinstance(entry, list) else entry.values() if isinstance(entry, dict) else ()
    return [entry] if isinstance(entry, str) else [page for part in parts for page in menu_pages(part)]


def test_the_menu_has_every_page_once():
    pages = menu_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(pages) == len(set(pages))
    assert {f"docs/{page}" for page in pages} <= set(PAGES)
    assert {page.removeprefix("docs/") for page in PAGES[1:]} <= set(pages)


def test_the_reference_has_every_public_name_and_no_other_than_exist():
    entries = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(entries) == len(set(entries))
    for entry in entries:
        assert resolved(entry).__doc__, entry
    assert set(hf_mtp.__all__) <= {entry.rpartition(".")[2] for entry in entries}


def resolved(name: str):
    """What a dotted name such as `hf_mtp.model.GatedLoraModel.forward` means."""
    parts = name.split(".")
    files = [ROOT.joinpath(*parts[:end]) for end in range(1, len(parts) + 1)]
    module = ".".join(parts[: sum(file.is_dir() or file.with_suffix(".py").is_file() for file in files)])
    value = importlib.import_module(module)
    for part in parts[module.count(".") + 1 :]:
        value = getattr(value, part)
    return value


# ---------------------------------------------------------------- examples

# Names that an example may take for granted: the quick tour defines them.
GIVEN = {"torch", "model", "base", "tokenizer", "dataset", "inputs", "processor"}
OPTIONAL = {"lm_eval"}  # packages of extras that the tests do not need


def blocks(page: str, language: str) -> list[str]:
    """The examples of a page in one language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def calls(tree: ast.AST) -> list[tuple[str, list[str]]]:
    """Called names, with the names of the arguments."""
    return [
        (node.func.id, [keyword.arg for keyword in node.keywords if keyword.arg])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_examples_use_names_and_arguments_that_exist(page):
    tree = ast.parse("".join(blocks(page, "python")))
    nodes = list(ast.walk(tree))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    stored = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    stored |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    stored |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    assert {name.id for name in names} <= imported | stored | GIVEN | set(hf_mtp.__all__) | set(vars(builtins))
    for node in imports:
        if getattr(node, "module", "").partition(".")[0] in OPTIONAL:
            continue
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            assert hasattr(importlib.import_module(node.module), alias.name), alias.name
    for name, arguments in calls(tree):
        if dataclasses.is_dataclass(getattr(hf_mtp, name, None)):
            assert set(arguments) <= {field.name for field in dataclasses.fields(getattr(hf_mtp, name))}


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    for block in blocks(page, "bash"):
        assert set(re.findall(r"^hf-mtp ([a-z]\S*)", block, re.MULTILINE)) <= verbs


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A folder with `my-base`, the quickstart's base, and `my-adapter`, untrained."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(TOY, folder / "my-base")
    base = AutoModelForCausalLM.from_pretrained(folder / "my-base", dtype=torch.float32)
    get_peft_model(base, hf_mtp.GatedLoraConfig(k=4, r=4)).save_pretrained(folder / "my-adapter")
    return folder


@pytest.mark.parametrize("page", ["docs/decoding.md", "docs/troubleshooting.md", "docs/friends.md"])
def test_examples_run(page, folders, monkeypatch):
    monkeypatch.chdir(folders)
    base = AutoModelForCausalLM.from_pretrained("my-base", dtype=torch.float32)
    model = get_peft_model(base, hf_mtp.GatedLoraConfig(k=4, r=4))
    examples = "".join(blocks(page, "python")).replace("cache=cache", f"{CACHE}=cache")
    exec(examples, {"model": model, "tokenizer": AutoTokenizer.from_pretrained("my-base")})


NOTEBOOK = ROOT / "examples" / "notebooks" / "quicktour.ipynb"


def code_cells() -> list[dict]:
    """The notebook's cells of code."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_runs_offline(monkeypatch, capsys):
    monkeypatch.chdir(NOTEBOOK.parent)
    script = "\n".join("".join(cell["source"]) for cell in code_cells())
    exec(script.replace("STEPS = 120", "STEPS = 2"), {})
    printed = capsys.readouterr().out
    assert printed.count("same text: True") == 3 and printed.count("same logits: True") == 1


def test_the_notebook_has_the_output_of_a_whole_run():
    outputs = [output for cell in code_cells() for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream"}
    assert {output["name"] for output in outputs} == {"stdout"}
    printed = "".join(line for output in outputs for line in output["text"])
    assert "step 120" in printed and printed.count("same text: True") == 3


# ---------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """What links can name in a page, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere():
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("examples/*/*.md"),
        ROOT / "docs" / "results" / "README.md",
        NOTEBOOK,
    ]
    for page in pages:
        for part in page.read_text(encoding="utf-8").split("](")[1:]:
            target, _, anchor = part.split(")")[0].partition("#")
            if "://" not in target:
                found = page.parent / target if target else page
                assert found.exists(), f"{page.name} links to {target}"
                assert not anchor or anchor in anchors(found), f"{page.name} links to {target}#{anchor}"
