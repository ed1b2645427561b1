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
from typer.testing import CliRunner

from skipvision.training.recipes import read_scratch_recipe
from svcli.app import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SERVING = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
EVALUATION = (ROOT / "docs" / "eval.md").read_text(encoding="utf-8")
TRITON = (ROOT / "docs" / "triton.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """Lines that start svcli, by itself or under torchrun, each as one."""
    whole = text.replace("\\\n", " ")
    return sorted(set(re.findall(r"^(?:torchrun .*? -m )?(svcli .*)$", whole, re.MULTILINE)))


def test_the_figure_of_the_tokens_is_the_one_that_the_recipe_gives() -> None:
    drawing = runpy.run_path(str(ROOT / "docs" / "tokens.py"))
    assert drawing["draw"](read_scratch_recipe(drawing["RECIPE"]).model) == (ROOT / "docs" / "tokens.svg").read_text()


@pytest.mark.parametrize(
    "line", commands(README) + commands(SERVING) + commands(TRITON) + commands(EVALUATION) + commands(TRAINING)
)
def test_commands_of_the_documents_exist(line: str) -> None:
    _, *words = shlex.split(line, comments=True)
    command = words[:2] if words[0] == "data" else words[:1]
    shown = CliRunner().invoke(app, [*command, "--help"])
    assert shown.exit_code == 0, shown.output
    options = {word for word in words if word.startswith("-")}
    assert all(re.search(rf"(^|\s){option}\b", shown.stdout) for option in options), shown.stdout


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


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
