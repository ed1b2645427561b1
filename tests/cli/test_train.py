"""`svcli train` passes its options on and shows how far it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from skipvision.training.scratch import TrainEvent
from skipvision.training.scratch_recipe import ScratchRecipe
from svcli.app import app

Report = Callable[[TrainEvent], None]
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "skipvision-tiny.toml"


def test_options_arrive_and_progress_is_written_in_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[object] = []

    def run(recipe: ScratchRecipe, output: Path, report: Report, *, cache_root: Path, fresh: bool) -> Path:
        seen.extend([recipe.optim.steps, output, cache_root, fresh])
        report(TrainEvent("encode", 10, 100, rate=25.0))
        report(TrainEvent("train", 1, 4, rate=48.0, loss=2.5))
        report(TrainEvent("validate", 4, 4, accuracy={"colour": 0.5, "all": 0.25}))
        return output / "checkpoint"

    monkeypatch.setattr("skipvision.training.scratch.train", run)
    options = ["-o", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--fresh"]
    done = CliRunner().invoke(app, ["train", str(RECIPE), *options])
    assert done.exit_code == 0, done.output
    assert seen[1:] == [tmp_path / "run", tmp_path / "cache", True]
    assert done.stdout == f"{tmp_path / 'run' / 'checkpoint'}\n"
    assert done.stderr.splitlines() == [
        "preparing 0%",
        "encoding pictures 10% 25 pictures/s",
        "training 25% loss 2.500 48 pictures/s",
        "step 4: validation colour 50.0%, all 25.0%",
    ]


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(*_: object, **__: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("skipvision.training.scratch.train", run)
    done = CliRunner().invoke(app, ["train", str(RECIPE), "-o", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (130, "")
    assert "same command" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"), [("", "model"), ("base = 'x'\ncolour = 1", "colour"), ("[[[", "recipe.toml")]
)
def test_a_broken_recipe_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    done = CliRunner().invoke(app, ["train", str(path), "-o", str(tmp_path / "run")])
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_recipe_is_one_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["train", "nowhere.toml", "-o", str(tmp_path / "run")])
    assert (done.exit_code, done.stderr) == (2, "Error: nowhere.toml: no such recipe\n")
