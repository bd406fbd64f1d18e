"""The pages of docs/ that scripts write are what the scripts would write now."""

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


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for part in page.read_text(encoding="utf-8").split("](")[1:]:
            target = part.split(")")[0].split("#")[0]
            if target and "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
