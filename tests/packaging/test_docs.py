"""What the documents show is what the code says."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from skipvision.training.recipes import read_scratch_recipe
from svcli.app import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_figure_of_the_tokens_is_the_one_that_the_recipe_gives() -> None:
    drawing = runpy.run_path(str(ROOT / "docs" / "tokens.py"))
    assert drawing["draw"](read_scratch_recipe(drawing["RECIPE"]).model) == (ROOT / "docs" / "tokens.svg").read_text()


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^svcli .*", README, re.MULTILINE))))
def test_commands_of_the_readme_exist(line: str) -> None:
    _, *words = shlex.split(line, comments=True)
    command = words[:2] if words[0] == "data" else words[:1]
    shown = CliRunner().invoke(app, [*command, "--help"])
    assert shown.exit_code == 0, shown.output
    options = {word for word in words if word.startswith("-")}
    assert all(re.search(rf"(^|\s){option}\b", shown.stdout) for option in options), shown.stdout


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
