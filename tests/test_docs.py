"""Pages: the written parts are up to date, examples define their names, and links lead somewhere."""

import ast
import builtins
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("script", ["make_reference.py", "make_tables.py"])
def test_written_pages_are_up_to_date(script):
    result = subprocess.run(
        [sys.executable, ROOT / "docs" / script, "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("figure", ["mask", "ablation"])
def test_figures_can_be_drawn_again(figure, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    runpy.run_path(str(ROOT / "docs" / "figures" / f"draw_{figure}.py"))["main"](tmp_path)
    drawn, committed = (imread(folder / f"{figure}.png") for folder in (tmp_path, ROOT / "docs" / "figures"))
    assert drawn.shape == committed.shape
    assert abs(drawn - committed).mean() < 0.02  # fonts differ from machine to machine


@pytest.mark.parametrize("page", ["README.md", "docs/quicktour.md"])
def test_examples_define_every_name_that_they_use(page):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    nodes = list(ast.walk(ast.parse("".join(blocks))))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    imported = {
        alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    stored = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    assert {name.id for name in names} <= imported | stored | {"torch", "processor"} | set(vars(builtins))


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
    ]
    for page in pages:
        for part in page.read_text(encoding="utf-8").split("](")[1:]:
            target, _, anchor = part.split(")")[0].partition("#")
            if "://" not in target:
                found = page.parent / target if target else page
                assert found.exists(), f"{page.name} links to {target}"
                assert not anchor or anchor in anchors(found), f"{page.name} links to {target}#{anchor}"
