"""TensorBoard and Weights & Biases get what a run tells, and a run that goes on tells nothing twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from skipvision.training.events import Event, StepEvent
from svcli.app import app
from svcli.training.loggers import scalars
from tests.cli.fake_training import RECIPE, FakeTraining, install, step_event
from tests.cli.test_train_shown import program
from tests.optional import missing

TENSORBOARD, WANDB = "log.tensorboard=true", 'log.wandb="project"'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def stop_at(step: int) -> FakeTraining:
    def stop(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == step:
            raise KeyboardInterrupt

    return FakeTraining(stop=stop)


def train(recipe: Path, *options: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["train", str(recipe), "-o", str(recipe.with_name("run")), *options])
    assert done.exit_code == code, done.output
    return done.stderr


def test_scalars_say_what_a_step_cost() -> None:
    found = scalars(step_event(3))
    assert found["speed/tokens_per_second"] == pytest.approx(1344)
    assert found["speed/rows_per_second"] == pytest.approx(1000)
    assert found["visual/kept_share"] == pytest.approx(392 / 1024)
    assert found["seconds/backward"] == 0.5
    assert found["memory/bytes"] == 3 << 30
    assert {"train/loss", "train/learning_rate", "train/grad_norm"} <= found.keys()


def read_tensorboard(folder: Path) -> Any:
    if find_spec("tensorboard") is None:
        missing("tensorboard")
    accumulator = import_module("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    read.Reload()
    return read


# tensorboard's own reader asks numpy and protobuf for what they deprecate.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_each_step_once_though_some_were_done_again(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path
) -> None:
    if find_spec("tensorboard") is None:
        missing("tensorboard")
    install(monkeypatch, stop_at(18))
    assert "goes on from step 10" in train(recipe, "--set", TENSORBOARD, code=130)
    install(monkeypatch, FakeTraining())
    train(recipe, "--set", TENSORBOARD)
    read = read_tensorboard(tmp_path / "run" / "tensorboard")
    losses = read.Scalars("train/loss")
    assert [each.step for each in losses] == list(range(1, 41))
    assert [each.value for each in losses] == pytest.approx([3.0 / (1 + step / 10) for step in range(1, 41)])
    assert [each.step for each in read.Scalars("validation/loss")] == [10, 20, 30, 40]
    text = read.Tensors("recipe/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert 'path = "train.json"' in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_forgets_a_run_that_begins_anew(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path
) -> None:
    if find_spec("tensorboard") is None:
        missing("tensorboard")
    install(monkeypatch, FakeTraining())
    train(recipe, "--set", TENSORBOARD)
    train(recipe, "--fresh", "--set", TENSORBOARD, "--set", "optim.steps=5")
    read = read_tensorboard(tmp_path / "run" / "tensorboard")
    assert [each.step for each in read.Scalars("train/loss")] == [1, 2, 3, 4, 5]


class FakeService(ModuleType):
    """In place of wandb: notes what it is told."""

    class Error(Exception):
        """wandb.errors.Error."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = SimpleNamespace(Error=self.Error)
        self.starts: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ends: list[int] = []
        self.refuses = ""

    def Settings(self, **values: object) -> dict[str, object]:
        return values

    def init(self, **given: Any) -> FakeService:
        if self.refuses:
            raise self.Error(self.refuses)
        self.starts.append(given)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.ends.append(exit_code)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeService]:
    fake = FakeService()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    yield fake
    assert len(fake.starts) == len(fake.ends)


def test_weights_and_biases_goes_on_under_the_same_id(
    monkeypatch: pytest.MonkeyPatch, service: FakeService, recipe: Path, tmp_path: Path
) -> None:
    install(monkeypatch, stop_at(18))
    train(recipe, "--set", WANDB, code=130)
    install(monkeypatch, FakeTraining())
    train(recipe, "--set", WANDB)
    first, second = service.starts
    assert (first["project"], first["resume"], first["dir"]) == ("project", "allow", str(tmp_path / "run"))
    assert first["config"]["optim"]["steps"] == 40
    assert first["id"] == second["id"]
    assert service.ends == [1, 0]
    assert [step for step, values in service.logged if "train/loss" in values][-30:] == list(range(11, 41))
    step, values = service.logged[-1]
    assert (step, list(values)) == (40, ["validation/loss"])
    assert values["validation/loss"] == pytest.approx(0.62)
    train(recipe, "--fresh", "--set", WANDB)
    assert service.starts[2]["id"] != first["id"]


@pytest.mark.slow
def test_weights_and_biases_writes_a_run_without_a_network(recipe: Path, tmp_path: Path) -> None:
    if find_spec("wandb") is None:
        missing("wandb")
    arguments = ["train", str(recipe), "-o", str(tmp_path / "run"), "--set", WANDB]
    environ = {**os.environ, "WANDB_MODE": "offline", "WANDB_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([*program(0), *arguments], capture_output=True, env=environ, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["event"] == "done"
    assert done.stderr == b""
    identity = (tmp_path / "run" / "wandb-id").read_text()
    (written,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{identity}.wandb")
    assert written.read_bytes().count(b"train/loss") >= 40


def test_what_weights_and_biases_refuses_is_one_sentence_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, service: FakeService, recipe: Path, tmp_path: Path
) -> None:
    install(monkeypatch, FakeTraining())
    service.refuses = "No API key configured. Use `wandb login` to log in.\nmore"
    told = train(recipe, "--set", WANDB, code=1)
    assert told == "Error: Weights & Biases: No API key configured. Use `wandb login` to log in.\n"
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize(("option", "package"), [(TENSORBOARD, "tensorboard"), (WANDB, "wandb")])
def test_a_logger_that_is_not_installed_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path, option: str, package: str
) -> None:
    install(monkeypatch, FakeTraining())
    monkeypatch.setitem(sys.modules, package, None)
    told = train(recipe, "--set", option, code=3)
    assert told == f'Error: {package} is needed for this and not installed: pip install "svcli[loggers]"\n'
    assert not (tmp_path / "run" / "log.jsonl").exists()
