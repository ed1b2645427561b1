"""`svcli train` on a tiny model, from conversations to a checkpoint that `svcli export` takes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from svcli.training.facts import read_history
from tests.cli.test_terminal import ESCAPE, environment, finish, spawn

COLOURS = ("red", "green", "blue", "black", "white", "yellow")
STEPS = 40

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe beside twelve conversations about six pictures."""
    folder = tmp_path_factory.mktemp("tune")
    samples = []
    for number in range(12):
        colour = COLOURS[number % 6]
        Image.new("RGB", (64, 48), colour).save(folder / f"{colour}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": f"A {colour} ball{'.' * (number // 6)}"},
        ]
        samples.append({"id": str(number), "image": f"{colour}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(samples))
    path = folder / "recipe.toml"
    path.write_text(
        f"""
base = "{checkpoint}"
data = {{ sources = [{{ path = "{folder / "train.json"}" }}], validation_samples = 2, max_length = 96 }}
optim = {{ steps = {STEPS}, batch_size = 4, micro_batch_size = 2, learning_rate = 4e-3 }}
save = {{ every = 10 }}
precision = "fp32"
"""
    )
    return path


@pytest.fixture(scope="module")
def straight(command: list[str], recipe: Path) -> Path:
    """A run that nobody stopped, in a pipe."""
    run = recipe.with_name("straight")
    done = subprocess.run(
        [*command, "train", str(recipe), "-o", str(run)], capture_output=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["step"] for each in told if each["event"] == "step"] == list(range(1, STEPS + 1))
    assert told[-1]["checkpoint"] == str(run / "checkpoint")
    return run


def test_what_is_learned_can_be_exported(command: list[str], straight: Path, tmp_path: Path) -> None:
    losses = read_history(straight / "log.jsonl").losses
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    arguments = ["export", str(straight / "checkpoint"), "-o", str(tmp_path / "bundle"), "--max-context", "96"]
    done = subprocess.run([*command, *arguments], capture_output=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_stopped_with_ctrl_c_ends_as_the_one_that_was_not(
    command: list[str], recipe: Path, straight: Path
) -> None:
    run = recipe.with_name("stopped")
    child = spawn(command, "train", recipe, "-o", run)
    child.expect("step 10: saved")
    child.sendintr()
    screen = ESCAPE.sub("", finish(child)).replace("\r\n", "\n")
    assert child.exitstatus == 130
    assert "Traceback" not in screen
    assert "goes on from step " in screen.splitlines()[-1]
    stopped = len(read_history(run / "log.jsonl").steps)
    assert 10 <= stopped < STEPS
    child = spawn(command, "train", recipe, "-o", run)
    screen = ESCAPE.sub("", finish(child))
    assert child.exitstatus == 0
    assert "Trained" in screen
    assert screen.rstrip().endswith(str(run / "checkpoint"))
    assert read_history(run / "log.jsonl") == read_history(straight / "log.jsonl")
    for name in ("model.safetensors", "config.json"):
        assert (run / "checkpoint" / name).read_bytes() == (straight / "checkpoint" / name).read_bytes()


def test_a_run_that_is_done_says_so_again(command: list[str], recipe: Path, straight: Path) -> None:
    done = subprocess.run(
        [*command, "train", str(recipe), "-o", str(straight)], capture_output=True, env=environment(), check=True
    )
    (told,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert (told["event"], told["steps"]) == ("done", STEPS)
    screen = ESCAPE.sub("", finish(spawn(command, "train", recipe, "-o", straight)))
    assert "svcli export" in screen


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ('base="nowhere/at-all"', "nowhere"),
        ('data.sources=[{path="none.json"}]', "none.json"),
        ("optim.stepz=3", "stepz"),
        ("optim.steps", "KEY=VALUE"),
        ("data.max_length=8", "samples are broken"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(
    command: list[str], recipe: Path, tmp_path: Path, setting: str, words: str
) -> None:
    arguments = ["train", str(recipe), "-o", str(tmp_path / "run"), "--set", setting]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment(HF_HUB_OFFLINE="1"), check=False
    )
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("Error: ")
    assert words in sentence
