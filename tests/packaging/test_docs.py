"""What the documents show is what the code says."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from skipvision.layout import TokenLayout
from skipvision.model import attention_mask
from skipvision.training.recipes import read_scratch_recipe
from tests.packaging.code_blocks import documents

ROOT = Path(__file__).parents[2]
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_figure_of_the_tokens_is_the_one_that_the_recipe_gives() -> None:
    drawing = runpy.run_path(str(ROOT / "docs" / "tokens.py"))
    assert drawing["draw"](read_scratch_recipe(drawing["RECIPE"]).model) == (ROOT / "docs" / "tokens.svg").read_text()


@pytest.mark.parametrize("name", ["layout_orders.svg", "layout_masks.svg"])
def test_figures_of_the_layout_are_those_of_the_code(name: str) -> None:
    figures = runpy.run_path(str(ROOT / "docs" / "layout_figures.py"))["FIGURES"]
    assert figures[name]() == (ROOT / "docs" / name).read_text()


def test_the_mask_that_is_drawn_is_that_of_the_model() -> None:
    drawing = runpy.run_path(str(ROOT / "docs" / "layout_figures.py"))
    for visibility in ("image", "all"):
        layout = TokenLayout(drawing["SEGMENTS"], visibility)
        order = layout.positions.argsort()
        rows = (torch.from_numpy(each)[None] for each in (layout.positions, layout.visible_until))
        mask = attention_mask(*rows)[0, 0].numpy()[order][:, order]
        assert (mask == drawing["attends"](layout)).all()


@pytest.mark.slow
def test_the_first_commands_of_the_guide_to_training_lead_to_an_answer(tmp_path: Path) -> None:
    block = TRAINING.partition("```sh\n")[2].partition("```")[0]
    assert [line.split()[1] for line in block.splitlines()] == ["export", "train", "export", "chat"]
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "export", "engines"))
    environ = {**os.environ, "PYTHONPATH": paths}
    for line in block.splitlines():
        words = [word.replace("build/", f"{tmp_path}/") for word in shlex.split(line)[1:]]
        done = subprocess.run(
            [sys.executable, "-m", "svcli", *words], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md")), ids=lambda path: path.name
)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md")), ids=lambda path: path.name
)
def test_no_half_of_a_merge_is_left(path: Path) -> None:
    assert not re.search(r"^(<{7}|={7}|>{7})( |$)", path.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("document", documents())
def test_files_that_documents_name_are_there(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    tests = {path.name for path in (ROOT / "tests").rglob("*.py")}
    assert set(re.findall(r"`(test_\w+\.py)`", text)) <= tests
    roots = (ROOT, ROOT / "export", ROOT / "engines", (ROOT / document).parent)
    for name in re.findall(r"`((?:[a-z_]+/)+[\w-]+\.(?:py|toml|cu|cpp|html))`", text):
        assert any((root / name).exists() for root in roots) or name.startswith("build/"), name
