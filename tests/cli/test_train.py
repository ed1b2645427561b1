"""`svcli train` passes its options on and tells how far it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from skipvision.training.events import DoneEvent, Report, Seconds, StageEvent, ValidationEvent
from skipvision.training.recipes import read_recipe
from skipvision.training.scratch_recipe import ScratchRecipe
from skipvision.training.tune_recipe import TuneRecipe
from svcli.app import app
from tests.cli.fake_training import step_event

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "skipvision-tiny.toml"


def test_options_arrive_and_a_run_from_nothing_tells_what_any_run_tells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[object] = []

    def run(recipe: ScratchRecipe, output: Path, report: Report, *, cache_root: Path, fresh: bool) -> Path:
        seen.extend([recipe.optim.steps, output, cache_root, fresh])
        report(StageEvent("encoding pictures", 10, 100))
        report(step_event(1))
        report(ValidationEvent(1, {"colour": 0.5, "all": 0.25}, best=False))
        report(DoneEvent(output / "checkpoint", 1, 2.5, 0, Seconds(), 1000, 0))
        return output / "checkpoint"

    monkeypatch.setattr("skipvision.training.scratch.train", run)
    options = ["-o", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--fresh"]
    done = CliRunner().invoke(app, ["train", str(RECIPE), *options])
    assert done.exit_code == 0, done.output
    assert seen[1:] == [tmp_path / "run", tmp_path / "cache", True]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["event"] for each in told] == ["step", "validation", "done"]
    assert told[1]["scores"] == {"colour": 0.5, "all": 0.25}
    assert told[-1]["checkpoint"] == str(tmp_path / "run" / "checkpoint")
    assert done.stderr == ""


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(*_: object, **__: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("skipvision.training.scratch.train", run)
    done = CliRunner().invoke(app, ["train", str(RECIPE), "-o", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr == "Note: stopped before anything was saved; the same command begins anew\n"
    (tmp_path / "states" / "step-000010").mkdir(parents=True)
    done = CliRunner().invoke(app, ["train", str(RECIPE), "-o", str(tmp_path)])
    assert "goes on from the last state that is there" in done.stderr


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


def test_a_recipe_is_shown_with_what_was_set_and_reads_back(tmp_path: Path) -> None:
    arguments = ["--set", "optim.steps=7", "--set", "base=somewhere", "--print-config"]
    sources = ["--set", 'data.sources=[{path="train.json"}]']
    done = CliRunner().invoke(app, ["train", "sv-llava-100", *sources, *arguments])
    assert (done.exit_code, done.stderr) == (0, "")
    path = tmp_path / "again.toml"
    path.write_text(done.stdout)
    recipe = read_recipe(str(path), ())
    assert isinstance(recipe, TuneRecipe)
    assert (recipe.optim.steps, recipe.base, recipe.preset) == (7, "somewhere", "sv-llava-100")
    assert CliRunner().invoke(app, ["train", str(path), "--print-config"]).stdout == done.stdout


def test_presets_are_named() -> None:
    done = CliRunner().invoke(app, ["train", "--list"])
    assert done.exit_code == 0
    assert "sv-llava-100" in done.stdout


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["train", str(RECIPE), "--set", "optim.stepz=7", "-o", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "stepz" in done.stderr


def test_without_a_folder_or_a_recipe_the_sentence_says_what_is_missing(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["train", str(RECIPE)])
    assert (done.exit_code, done.stderr) == (2, "Error: name the folder of the run: svcli train RECIPE -o FOLDER\n")
    done = CliRunner().invoke(app, ["train"])
    assert (done.exit_code, done.stderr) == (2, "Error: name a recipe, or see the presets: svcli train --list\n")
    file = tmp_path / "file"
    file.touch()
    done = CliRunner().invoke(app, ["train", str(RECIPE), "-o", str(file)])
    assert (done.exit_code, done.stderr) == (2, f"Error: {file} is a file; name a folder for the run\n")


def test_a_folder_that_cannot_be_written_is_one_sentence() -> None:
    done = CliRunner().invoke(app, ["train", str(RECIPE), "-o", "/proc/run"])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: /proc/run: ")
    assert len(done.stderr.splitlines()) == 1
