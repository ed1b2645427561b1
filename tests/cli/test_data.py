"""`svcli data fetch` fetches, then prepares; `svcli data check` names what is broken before anything is trained."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from skipvision.data.errors import DataError
from skipvision.training.scratch_recipe import ScratchRecipe
from svcli.app import app
from tests.training.sets import asked, write_lines


@pytest.mark.parametrize("given", [True, False])
def test_fetch_then_prepare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: bool) -> None:
    seen: list[tuple[str, Path]] = []
    monkeypatch.setattr("skipvision.data.assets.fetch", lambda root: seen.append(("fetch", root)))
    monkeypatch.setattr("skipvision.data.assets.prepare", lambda root: seen.append(("prepare", root)))
    done = CliRunner().invoke(app, ["data", "fetch", *([str(tmp_path)] if given else [])])
    folder = tmp_path if given else Path(str(ScratchRecipe.__dataclass_fields__["assets"].default))
    assert done.exit_code == 0, done.output
    assert seen == [("fetch", folder), ("prepare", folder)]
    assert done.stdout == f"{folder}\n"
    assert "downloading packages" in done.stderr


def test_what_cannot_be_fetched_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fetch(_root: Path) -> None:
        raise DataError("npm is needed to fetch openmoji: install it first")

    monkeypatch.setattr("skipvision.data.assets.fetch", fetch)
    done = CliRunner().invoke(app, ["data", "fetch", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "Error: npm is needed to fetch openmoji: install it first"


def check(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["data", "check", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def told(done: Result) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def lines(done: Result) -> list[str]:
    return [" ".join(line.split()) for line in done.stdout.splitlines()]


@pytest.fixture
def conversations(tmp_path: Path, picture: Path) -> Path:
    """Ten samples: six about a picture, one without, three that are broken."""
    (tmp_path / "pictures").mkdir()
    shutil.copy(picture, tmp_path / "pictures/red.png")
    (tmp_path / "pictures/cut.png").write_bytes(picture.read_bytes()[:60])
    seen = [
        asked("<image>\nWhat is this?", "A red ball.", image=name) for name in ["red.png"] * 6 + ["cut.png", "no.png"]
    ]
    return write_lines(
        tmp_path / "set.jsonl", [*seen, asked("How many cups are there?"), {"conversations": [{"from": "bot"}]}]
    )


@pytest.fixture
def recipe(tmp_path: Path, checkpoint: Path, conversations: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
base = "{checkpoint}"
optim = {{ batch_size = 4, micro_batch_size = 2 }}

[data]
max_length = 64
max_broken = 3

[[data.sources]]
path = "{conversations}"
images = "{conversations.parent / "pictures"}"
"""
    )
    return path


def test_what_a_recipe_shows_is_counted_and_what_is_broken_is_named(recipe: Path, conversations: Path) -> None:
    shown = lines(check(recipe))
    assert f"{conversations} 10 3 6 6 1" in shown
    assert f"{conversations} 36 24 96" in shown  # 6, 4 and 16 of each picture
    named = shown[shown.index("broken picture: 1") :]
    assert named[1].startswith(f"{conversations} line 7: cut.png: damaged (")
    assert named[2:] == [
        "missing picture: 1",
        f"{conversations} line 8: no.png: no such file",
        "unknown role: 1",
        f"{conversations} line 10: unknown role 'bot'",
        "Steps of an epoch: 2, of 4 sequences each.",
    ]


def test_programs_are_told_all_of_it(recipe: Path, conversations: Path) -> None:
    said = told(check(recipe, "--json", "--set", "data.max_broken=2", "--set", "optim.batch_size=2", code=1))
    assert said["problem"] == "3 of 10 samples are broken, and data.max_broken allows 2"
    (source,) = said["sources"]
    assert source == said["whole"] | {"name": str(conversations)}
    assert (source["samples"], source["with_pictures"], source["text_alone"]) == (10, 6, 1)
    assert source["broken"] == {"broken picture": 1, "missing picture": 1, "unknown role": 1}
    assert (source["visual_kept"], source["visual_skipped"], source["visual_plain"]) == (6 * 6, 6 * 4, 6 * 16)
    assert source["rows"]["p50"] <= source["rows"]["p95"] <= source["rows"]["most"] <= 64
    assert [each["name"].rpartition(" ")[2] for each in said["broken"]] == ["7", "8", "10"]
    assert said["steps_per_epoch"] == 4


def test_data_sets_are_checked_for_a_model_without_a_recipe(checkpoint: Path, conversations: Path) -> None:
    folder = conversations.parent / "pictures"
    done = check(conversations, conversations, "--base", checkpoint, "--images", folder, "--max-length", "20", code=1)
    shown = lines(done)
    assert "all 20 18 0 0 2" in shown
    named = shown[shown.index("too long: 14") + 1 :]
    assert named[:3] == [f"{conversations} line {n}: 21 rows, and at most 20 are allowed" for n in (1, 2, 3)]
    assert named[3] == "missing picture: 2"
    assert "--json names all." in shown
    assert done.stderr.splitlines()[-1] == "Error: 18 of 20 samples are broken, and data.max_broken allows 0"


def test_several_processes_say_the_same(recipe: Path) -> None:
    assert told(check(recipe, "--json", "--workers", "2")) == told(check(recipe, "--json"))


def test_nothing_to_train_on_is_an_error_however_much_may_be_broken(recipe: Path) -> None:
    done = check(recipe, "--set", "data.max_broken=99", "--set", "data.max_length=1", code=1)
    assert "nothing to train on" in done.stderr.splitlines()[-1]


def test_a_preset_changes_which_rows_are_skipped(recipe: Path) -> None:
    said = told(check(recipe, "--json", "--set", "preset=off"))["whole"]
    assert (said["visual_kept"], said["visual_skipped"]) == (said["visual_plain"], 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.toml"], "absent.toml: no such recipe"),
        (["a.toml", "b.toml"], "one recipe at a time; data sets alone need --base, the model that reads them"),
        (["a.toml", "--images", "x"], "--images and --max-length go with --base; a recipe says both itself"),
        (["a.json", "--base", "x", "--set", "a=1"], "--set changes a recipe, and --base goes without one"),
        (["a.json", "--base", "no such folder"], "no such folder: no such folder"),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(arguments: list[str], message: str) -> None:
    done = check(*arguments, code=2)
    assert (done.stdout, done.stderr.splitlines()[-1]) == ("", f"Error: {message}")


def test_a_set_that_is_missing_is_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    done = check(tmp_path / "absent.json", "--base", checkpoint, code=2)
    assert done.stderr.splitlines()[-1] == f"Error: {tmp_path}/absent.json: no such file"


def test_a_recipe_from_nothing_has_nothing_to_check() -> None:
    done = check("recipes/skipvision-tiny.toml", code=2)
    assert "makes its own pictures and questions" in done.stderr


def test_ctrl_c_leaves_quietly(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("skipvision.training.index.measure_sample", stopped)
    done = check(recipe, code=130)
    assert (done.stdout, "Traceback" in done.stderr) == ("", False)


@pytest.mark.parametrize("question", ["How many?", "<image>\nHow many?"])
def test_a_set_of_one_sample(tmp_path: Path, checkpoint: Path, picture: Path, question: str) -> None:
    image = {"image": picture.name} if "<image>" in question else {}
    path = write_lines(tmp_path / "one.jsonl", [asked(question, "Three.", **image)])
    shown = lines(check(path, "--base", checkpoint, "--images", picture.parent))
    assert f"{path} 1 0 {len(image)} {len(image)} {1 - len(image)}" in shown
    assert ("visual rows" in shown) == bool(image)
    assert shown[-1] == "Steps of an epoch: 1, of 128 sequences each."


def test_a_set_whose_pictures_are_all_broken(recipe: Path, conversations: Path) -> None:
    write_lines(conversations, [asked("<image>", image="cut.png")] * 5)
    done = check(recipe, "--set", "data.max_broken=5", code=1)
    assert "broken picture: 5" in lines(done)
    assert done.stderr.splitlines()[-1].startswith("Error: data.sources have no sample that can be shown")


def test_a_library_that_is_not_installed_is_named(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set.parquet").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    done = check(tmp_path / "set.parquet", "--base", checkpoint, code=3)
    said = 'datasets is needed for this and not installed: pip install "svcli[train]"'
    assert done.stderr.splitlines()[-1] == f"Error: {said}"
