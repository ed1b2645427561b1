"""`svcli train` on what it cannot train on: one sentence, the right exit code, and nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from skipvision.checkpoint import load_checkpoint
from svcli.app import app
from tests.cli.test_terminal import environment

STEPS = 4


def asked(answer: str, picture: str | None = "red.png", question: str = "What is this?") -> dict[str, Any]:
    record: dict[str, Any] = {"question": question, "answer": answer}
    return record if picture is None else record | {"images": [picture]}


FEW = [asked("A red ball"), asked("A blue dog"), asked("Two cups"), asked("A cup", None)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a picture."""
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    return tmp_path


def write(data: Path, records: Sequence[object]) -> Path:
    path = data / "set.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def write_recipe(data: Path, base: Path, records: Sequence[object] = FEW) -> Path:
    path = data / "recipe.toml"
    path.write_text(
        f"""
base = "{base}"
precision = "fp32"
data = {{ sources = [{{ path = "{write(data, records)}" }}], max_length = 128 }}
optim = {{ steps = {STEPS}, batch_size = 2, micro_batch_size = 2, learning_rate = 1e-3 }}
save = {{ every = 2 }}
"""
    )
    return path


def train(recipe: Path, *arguments: str) -> Result:
    settings = [part for each in arguments for part in (["--set", each] if "=" in each else [each])]
    return CliRunner().invoke(app, ["train", str(recipe), "-o", str(recipe.with_name("run")), *settings])


def fails(done: Result, code: int, words: str) -> None:
    """One sentence."""
    assert done.exit_code == code, done.output
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("Error: ")
    assert words in sentence


def last(done: Result) -> dict[str, Any]:
    """The last event of a run that is done."""
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["event"] == "done"
    return found


BROKEN = asked("A red ball", "none.png")
LONG = asked("Much", None, "What is this? " * 6000)


@pytest.mark.parametrize(
    ("records", "code", "words"),
    [
        ([], 2, "set.jsonl: the file is empty"),
        ([BROKEN, BROKEN], 1, "2 of 2 samples are broken, and data.max_broken allows 0; the first: "),
        ([asked("A red ball"), LONG], 1, "1 of 2 samples is broken, and data.max_broken allows 0; the first: "),
    ],
    ids=["empty", "all-broken", "30,000-tokens"],
)
def test_a_set_that_cannot_be_shown(data: Path, checkpoint: Path, records: list[object], code: int, words: str) -> None:
    fails(train(write_recipe(data, checkpoint, records)), code, words)


def test_nothing_but_broken_samples_however_many_are_allowed(data: Path, checkpoint: Path) -> None:
    recipe = write_recipe(data, checkpoint, [BROKEN, BROKEN])
    fails(train(recipe, "data.max_broken=9"), 1, "no sample that can be shown: nothing to train on")


@pytest.mark.parametrize(
    "records",
    [
        [asked("A red ball")],
        [asked("A red ball", None)],
        [{"question": "What is this?", "answer": "Ten", "images": ["red.png"] * 10}],
    ],
    ids=["one", "text-alone", "ten-pictures"],
)
def test_a_small_or_odd_set_is_trained_on(data: Path, checkpoint: Path, records: list[object]) -> None:
    assert last(train(write_recipe(data, checkpoint, records)))["steps"] == STEPS


def test_broken_samples_that_are_allowed_are_named_and_counted(data: Path, checkpoint: Path) -> None:
    (data / "cut.png").write_bytes(b"no picture")
    recipe = write_recipe(data, checkpoint, [*FEW, BROKEN, asked("A dog", "cut.png")])
    done = train(recipe, "data.max_broken=2")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    broken = [each["broken"] for each in events if each["event"] == "broken"]
    assert {each["kind"]: each["name"].rsplit(" ", 1)[1] for each in broken} == {
        "missing picture": "5",
        "broken picture": "6",
    }
    assert last(done)["broken"] == 2


def test_pictures_that_were_mended_are_looked_at_again(data: Path, checkpoint: Path) -> None:
    recipe = write_recipe(data, checkpoint, [*FEW, BROKEN])
    fails(train(recipe), 1, "1 of 5 samples is broken")
    os.link(data / "red.png", data / "none.png")
    assert last(train(recipe))["broken"] == 0
    (data / "none.png").unlink()
    assert last(train(recipe))["broken"] == 0
    fails(train(recipe, "--fresh"), 1, "1 of 5 samples is broken")


def test_a_loss_that_is_no_number_leaves_a_checkpoint_of_the_last_state(data: Path, checkpoint: Path) -> None:
    recipe = write_recipe(data, checkpoint)
    assert last(train(recipe, "optim.learning_rate=1e9", "optim.steps=1", "save.every=1"))["steps"] == 1
    done = train(recipe, "--fresh", "optim.learning_rate=1e9", "save.every=1")
    fails(done, 1, "the loss is not a finite number in a batch of ")
    assert "set.jsonl line " in done.stderr
    assert f"{data / 'run' / 'checkpoint'} is of step 1, the last that was saved" in done.stderr
    state = load_file(data / "run" / "states" / "step-000001" / "shard-00001-of-00001.safetensors")
    saved = load_checkpoint(data / "run" / "checkpoint")
    assert torch.equal(saved.decoder.norm.weight, state["weight.model.decoder.norm.weight"])


def test_a_base_with_nan_is_named(data: Path, checkpoint: Path) -> None:
    base = data / "base"
    base.mkdir()
    for each in checkpoint.iterdir():
        (base / each.name).write_bytes(each.read_bytes())
    weights = base / "model.safetensors"
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(weights)
    name = next(each for each in tensors if each.endswith("ffn.up.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights, metadata)
    fails(train(write_recipe(data, base)), 1, f"{name} holds what is no finite number")


def test_a_state_of_another_base_recipe_or_set_says_which(data: Path, checkpoint: Path) -> None:
    recipe = write_recipe(data, checkpoint)
    last(train(recipe, "what=lora"))
    tuned = data / "run" / "checkpoint"
    states = data / "run" / "states"
    before = sorted(states.iterdir())
    fails(train(recipe, "what=lora", f"base={tuned}"), 1, "step-000004 belongs to another base; use another folder")
    fails(train(recipe), 1, "step-000004 belongs to another recipe; use another folder")
    last(train(recipe, "what=lora", "data.max_broken=3", "save.keep=5"))
    write(data, FEW[:3])
    fails(train(recipe, "what=lora"), 1, "step-000004 belongs to another data set; use another folder")
    assert sorted(states.iterdir()) == before


def test_a_state_of_another_version_is_kept_and_named(data: Path, checkpoint: Path) -> None:
    recipe = write_recipe(data, checkpoint)
    last(train(recipe))
    info = data / "run" / "states" / "step-000004" / "state.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"format": 9}))
    fails(train(recipe), 1, "a state of format 9, and this version reads 1; go on with the version that wrote it")
    assert info.is_file()


def test_folders_that_training_wrote_are_no_base_but_say_what_is(data: Path, checkpoint: Path) -> None:
    recipe = write_recipe(data, checkpoint)
    last(train(recipe, "what=lora", "optim.steps=1"))
    fails(train(recipe, f"base={data / 'run'}"), 2, f"name {data / 'run' / 'checkpoint'}")
    fails(train(recipe, f"base={data / 'run' / 'adapter'}"), 2, "these are adapters alone; name the checkpoint")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b'base = "x\n', "is no TOML ("), (b"\xff\xfe", "is no TOML, since it is no UTF-8")],
)
def test_a_recipe_that_is_no_toml(tmp_path: Path, content: bytes, words: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(content)
    fails(train(recipe), 2, words)


def test_a_slip_in_a_name_is_told(data: Path, checkpoint: Path) -> None:
    fails(train(write_recipe(data, checkpoint), "optim.stepz=3"), 2, "did you mean steps?")
    done = CliRunner().invoke(app, ["train", "sv-lava-100", "-o", str(data / "run")])
    fails(done, 2, "did you mean sv-llava-100?")


def test_two_runs_at_once_and_a_set_that_changes_meanwhile(command: list[str], data: Path, checkpoint: Path) -> None:
    recipe = write_recipe(data, checkpoint)
    more = ["--set", "optim.steps=100000", "--set", "save.every=100000"]
    arguments = [*command, "train", str(recipe), "-o", str(data / "run"), *more]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as first:
        try:
            assert first.stdout is not None
            assert '"step": 1,' in first.stdout.readline()
            fails(train(recipe), 1, "another run goes on in this folder")
            write(data, [*FEW, asked("A cup")])
            _, said = first.communicate(timeout=300)
        finally:
            first.kill()
    (sentence,) = said.splitlines()
    assert sentence.startswith(f"Error: {data / 'set.jsonl'}: has changed since it was opened")
    assert first.returncode == 2
