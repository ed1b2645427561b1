"""Training a base model from files to a checkpoint."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from skipvision.checkpoint import load_checkpoint
from skipvision.config import ModelConfig, SkipConfig
from skipvision.layout import BatchLayout, TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.training.base import Base
from skipvision.training.collate import Batch
from skipvision.training.conversation import Conversation
from skipvision.training.distributed import Processes
from skipvision.training.errors import TrainError
from skipvision.training.events import BrokenEvent, DoneEvent, Event, StepEvent, ValidationEvent
from skipvision.training.plan import PlanError
from skipvision.training.reader import Reader, ReadError
from skipvision.training.samples import read_sample
from skipvision.training.sources import open_sources
from skipvision.training.speaker import IGNORE
from skipvision.training.task import MicroBatch
from skipvision.training.tune import TuneModule, TuneTask, look_at, tune
from skipvision.training.tune_recipe import LoraRecipe, SaveRecipe, SourceRecipe, TuneData, TuneOptim, TuneRecipe
from tests.training.fake_speaker import END, PLAIN, SKIPPING, TILED, WordSpeaker
from tests.training.sets import asked, write_lines
from tests.training.shown import loss_alone

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (250, 250, 250)}


def silent(_event: Event) -> None:
    """What nobody reads."""


def base_of(config: ModelConfig = SKIPPING, *, tiled: bool = False) -> Base:
    torch.manual_seed(3)
    return Base(SkipVisionModel(config), WordSpeaker(tiled), "these weights")


def write_set(folder: Path, count: int = 4) -> Path:
    """Conversations about pictures of one colour but for two corners, and some without a picture."""
    folder.mkdir(exist_ok=True)
    records: list[dict[str, Any]] = []
    for number in range(count):
        name, colour = list(COLOURS.items())[number % 4]
        picture = Image.new("RGB", (30 + number, 28), colour)
        picture.paste((9 * number, 0, 0), (0, 0, 9, 9))
        picture.paste((0, 0, 9 * number), (20, 0, 29, 9))
        picture.save(folder / f"{number}.png")
        records.append(asked("<image>\nWhich colour is it", f"it is {name}", image=f"{number}.png", id=f"c{number}"))
        if number % 3 == 2:
            records.append(asked(f"how many are {number}", f"just {number}", id=f"t{number}"))
    return write_lines(folder / "set.jsonl", records)


def recipe_for(path: Path, **changes: Any) -> TuneRecipe:
    data = TuneData((SourceRecipe(str(path)),), max_length=64, **changes.pop("data", {}))
    optim = TuneOptim(**{"batch_size": 4, "micro_batch_size": 2, "learning_rate": 3e-3, **changes.pop("optim", {})})
    return TuneRecipe(base="tiny", data=data, optim=optim, precision="fp32", **changes)


def task_of(recipe: TuneRecipe, folder: Path, base: Base | None = None) -> TuneTask:
    base = base or base_of()
    return TuneTask(recipe, base, look_at(recipe, base, folder, silent, Processes()))


def names_of(step: Sequence[MicroBatch]) -> list[str]:
    return [name for micro in step for name in micro.names]


@pytest.mark.parametrize("config", [SKIPPING, PLAIN], ids=["skipping", "plain"])
def test_four_conversations_are_learned_by_heart_and_answered(tmp_path: Path, config: ModelConfig) -> None:
    path = write_set(tmp_path / "set")
    recipe = recipe_for(path, optim={"epochs": 40.0, "learning_rate": 1e-2}, save=SaveRecipe(every=1000))
    base, events = base_of(replace(config, projector_trained=False, skip_trained=False)), list[Event]()
    folder = tune(recipe, base, tmp_path / "run", events.append)
    losses = [event.loss for event in events if isinstance(event, StepEvent)]
    assert losses[-1] < 0.02 < 1 < losses[0]
    assert json.loads((folder / "config.json").read_text())["projector_trained"]
    assert (folder / "tokenizer.json").read_text() == "words False"
    model = load_checkpoint(folder)
    assert model.config == config
    source = open_sources(recipe.data.sources)[0]
    for index in range(len(source)):
        sample = read_sample(source, index, base.speaker, config, 64)
        labels = sample.spoken.labels
        start = next(place for place, label in enumerate(labels) if label != IGNORE) + 1
        expected = [label for label in labels if label not in (IGNORE, END)]
        answer = answer_to(model, sample.spoken.ids[:start], [view for view, _ in sample.views], len(expected) + 3)
        assert answer == expected


def answer_to(model: SkipVisionModel, ids: list[int], views: list[Any], room: int) -> list[int]:
    layout = TokenLayout.of(ids, WordSpeaker().image_id, model.config)
    pictures = torch.from_numpy(np.concatenate([np.zeros((0, 3, 28, 28), np.float32), *views]))
    width = model.config.text.hidden_size
    with torch.no_grad():
        visual = model.encode_images(pictures) if len(pictures) else torch.zeros(1, 0, width)
    return model.generate([ids], visual, BatchLayout.of([layout], len(ids)), room, END)[0]


def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", 9)
    random = replace(SKIPPING, skip=SkipConfig(1, 2, "random"))
    recipe = recipe_for(path, data={"pack": True}, optim={"epochs": 4.0, "batch_size": 2, "micro_batch_size": 1})
    whole, events = list[Event](), list[Event]()
    tune(replace(recipe, save=SaveRecipe(every=2)), base_of(random), tmp_path / "whole", whole.append)

    def stop(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepEvent) and event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(replace(recipe, save=SaveRecipe(every=2)), base_of(random), tmp_path / "run", stop)
    tune(replace(recipe, save=SaveRecipe(every=2)), base_of(random), tmp_path / "run", events.append)
    losses = {event.step: event.loss for event in whole if isinstance(event, StepEvent)}
    again = {event.step: event.loss for event in events if isinstance(event, StepEvent)}
    assert len(losses) > 6
    assert again == losses
    weights, others = (load_file(tmp_path / run / "checkpoint/model.safetensors") for run in ("whole", "run"))
    assert all(torch.equal(others[name], each) for name, each in weights.items())


def test_processes_share_each_step_and_any_step_can_be_the_first(tmp_path: Path) -> None:
    task = task_of(recipe_for(write_set(tmp_path / "set", 9), optim={"epochs": 2.0}), tmp_path)
    alone = [names_of(step) for step in task.batches(0, 0, 1)]
    assert len(alone) == task.num_steps == 6
    assert [len(step) for step in alone] == [4, 4, 4, 4, 4, 4]
    assert [names_of(step) for step in task.batches(4, 0, 1)] == alone[4:]
    shares = [list(task.batches(0, rank, 3)) for rank in range(3)]
    assert [sorted(names_of([*one, *two, *three])) for one, two, three in zip(*shares, strict=True)] == [
        sorted(step) for step in alone
    ]
    assert all(len({len(share) for share in step}) == 1 for step in zip(*shares, strict=True))


def assert_equal(one: MicroBatch, other: MicroBatch) -> None:
    assert isinstance(one, Batch)
    assert isinstance(other, Batch)
    for name, value in vars(one).items():
        theirs = getattr(other, name)
        assert torch.equal(value, theirs) if isinstance(value, Tensor) else value == theirs, name


@pytest.mark.slow
def test_processes_that_read_give_what_reading_in_line_gives(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", 9)
    (tmp_path / "set" / "4.png").write_bytes(b"no picture")
    recipe = recipe_for(path, data={"max_broken": 9})
    shown = look_at(recipe, base_of(), tmp_path, silent, Processes())
    inline = TuneTask(recipe, base_of(), shown)
    beside = TuneTask(replace(recipe, data=replace(recipe.data, num_workers=2)), base_of(), shown)
    before = torch.get_rng_state()
    theirs = list(beside.batches(1, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    ours = list(inline.batches(1, 0, 1))
    assert list(map(len, ours)) == list(map(len, theirs))
    for one, other in zip((m for step in ours for m in step), (m for step in theirs for m in step), strict=True):
        assert_equal(one, other)


@dataclass(frozen=True)
class Deadly:
    """A source that ends whoever reads it."""

    name: str = "deadly"
    fingerprint: str = "deadly"

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Conversation:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def name_of(self, index: int) -> str:
        return f"deadly {index}"


@pytest.mark.slow
def test_a_process_that_dies_while_reading_is_one_sentence() -> None:
    reader = Reader([Deadly()], np.zeros((1, 2), np.int64), WordSpeaker(), SKIPPING, 64)
    with pytest.raises(ReadError, match=r"out of memory, perhaps\): lower data.num_workers"):
        list(reader.batches([((0,),)], 1))
    assert multiprocessing.active_children() == []


LOSSES = """
import sys, json
from pathlib import Path
from tests.training.test_tune import base_of, recipe_for, silent
from skipvision.training.ending import end_at_once
from skipvision.training.tune import tune
from skipvision.training.tune_recipe import SaveRecipe
if __name__ == "__main__":
    data = {"validation_samples": 3}
    recipe = recipe_for(Path(sys.argv[1]), data=data, optim={"epochs": 2.0}, save=SaveRecipe(every=3), what=sys.argv[3])
    tune(recipe, base_of(), Path(sys.argv[2]), silent)
    end_at_once(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["projector", "lora"])
def test_two_processes_have_the_losses_of_one(tmp_path: Path, what: str) -> None:
    """Some micro-batches are text alone, and some steps have fewer micro-batches than processes."""
    path = write_set(tmp_path / "set", 10)
    recipe = recipe_for(
        path, data={"validation_samples": 3}, optim={"epochs": 2.0}, save=SaveRecipe(every=3), what=what
    )
    tune(recipe, base_of(), tmp_path / "run-1", silent)
    script = tmp_path / "script.py"
    script.write_text(LOSSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    arguments = [*command, str(path), str(tmp_path / "run-2"), what]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    files = [tmp_path / run / "log.jsonl" for run in ("run-1", "run-2")]
    logs = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    steps = [[row for row in log if row.get("event") == "step"] for log in logs]
    scores = [[row["scores"]["loss"] for row in log if row.get("event") == "validation"] for log in logs]
    assert len(steps[0]) == 6
    for name in ("samples", "rows", "answer_tokens", "visual_kept"):
        assert [row[name] for row in steps[0]] == [row[name] for row in steps[1]]
    # fp32: gradients are summed in another order.
    assert [row["loss"] for row in steps[1]] == pytest.approx([row["loss"] for row in steps[0]], rel=1e-4)
    assert len(scores[0]) == 2
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


def test_pictures_that_break_after_the_look_are_left_out_and_named(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", 4)
    recipe = recipe_for(path, data={"max_broken": 1}, optim={"batch_size": 8})
    task = task_of(recipe, tmp_path)
    (tmp_path / "set" / "2.png").write_bytes(b"no picture")
    step = next(iter(task.batches(0, 0, 1)))
    assert sum(micro.counts.samples for micro in step) == 4
    broken = [each for micro in step for each in micro.broken]
    assert len(broken) == 1
    assert "2.png" in broken[0].reason
    assert broken[0].name not in names_of(step)


def test_samples_that_are_broken_beforehand_are_named_once_and_counted(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", 4)
    (tmp_path / "set" / "2.png").unlink()
    recipe = recipe_for(path, data={"max_broken": 1}, optim={"epochs": 2.0})
    events: list[Event] = []
    tune(recipe, base_of(), tmp_path / "run", events.append)
    assert [event.count for event in events if isinstance(event, BrokenEvent)] == [1]
    assert [event.broken for event in events if isinstance(event, DoneEvent)] == [1]
    samples = [event.samples for event in events if isinstance(event, StepEvent)]
    assert sum(samples) == 2 * 4


def test_too_many_broken_samples_stop_the_run_before_it_starts(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", 4)
    for name in ("1.png", "2.png"):
        (tmp_path / "set" / name).unlink()
    events: list[Event] = []
    with pytest.raises(
        TrainError, match=r"2 of 5 samples are broken, and data.max_broken allows 1; the first: .*line 2: 1.png"
    ):
        tune(recipe_for(path, data={"max_broken": 1}), base_of(), tmp_path / "run", events.append)
    assert not any(isinstance(event, StepEvent) for event in events)


def test_pictures_that_were_mended_are_looked_at_again(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", 4)
    picture = tmp_path / "set" / "2.png"
    data = picture.read_bytes()
    picture.unlink()
    with pytest.raises(TrainError, match="1 of 5 samples is broken"):
        tune(recipe_for(path), base_of(), tmp_path / "run", silent)
    picture.write_bytes(data)
    tune(recipe_for(path), base_of(), tmp_path / "run", silent)
    picture.unlink()
    with pytest.raises(TrainError, match="1 of 5 samples is broken"):
        tune(recipe_for(path), base_of(), tmp_path / "run", silent, fresh=True)


def test_a_run_does_not_go_on_with_other_samples_than_it_had(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", 4)
    recipe = recipe_for(path, data={"max_broken": 1}, optim={"steps": 2})
    tune(recipe, base_of(), tmp_path / "run", silent)
    (tmp_path / "set" / "2.png").unlink()
    tune(recipe, base_of(), tmp_path / "run", silent)  # by its index
    (tmp_path / "run" / "index.safetensors").unlink()
    with pytest.raises(TrainError, match="belongs to another data set;"):
        tune(recipe, base_of(), tmp_path / "run", silent)


def test_validation_names_what_it_has_to_leave_out(tmp_path: Path) -> None:
    path, other = write_set(tmp_path / "set", 4), write_set(tmp_path / "other", 4)
    recipe = recipe_for(path, data={"validation": (SourceRecipe(str(other)),)})
    task = task_of(recipe, tmp_path)
    (tmp_path / "other" / "1.png").write_bytes(b"no picture")
    with torch.no_grad():
        found = task.validate()
    assert [each.name for each in found.broken] == [f"{other} line 2"]
    assert found.scores["loss"] > 0


def test_what_changes_nothing_of_what_is_learned_may_change_on_the_way(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", 4)
    (tmp_path / "set" / "2.png").unlink()
    recipe = recipe_for(path, data={"max_broken": 1}, optim={"steps": 4}, save=SaveRecipe(every=2))

    def stop(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(recipe, base_of(), tmp_path / "run", stop)
    events: list[Event] = []
    data = replace(recipe.data, max_broken=9)
    other = replace(recipe, base="elsewhere", checkpoint_activations=True, save=SaveRecipe(every=1), data=data)
    tune(other, base_of(), tmp_path / "run", events.append)
    assert [event.step for event in events if isinstance(event, StepEvent)] == [3, 4]
    tune(replace(recipe, save=SaveRecipe(every=9)), base_of(), tmp_path / "whole", silent)
    weights, others = (load_file(tmp_path / run / "checkpoint/model.safetensors") for run in ("whole", "run"))
    assert all(torch.equal(others[name], each) for name, each in weights.items())


def test_what_is_held_out_is_validated_on_and_never_shown(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", 9)
    recipe = recipe_for(path, data={"validation_samples": 3}, optim={"epochs": 3.0})
    task = task_of(recipe, tmp_path)
    shown = {name for step in task.batches(0, 0, 1) for name in names_of(step)}
    assert len(shown) == 9
    source = open_sources(recipe.data.sources)[0]
    held_out = {source[int(index)].name for index in task.validation}
    assert len(held_out) == 3
    assert not held_out & shown


def test_validation_is_the_mean_loss_of_all_answers(tmp_path: Path) -> None:
    path, other = write_set(tmp_path / "set", 4), write_set(tmp_path / "other", 7)
    recipe = recipe_for(path, data={"validation": (SourceRecipe(str(other)),)})
    base = base_of()
    task = task_of(recipe, tmp_path, base)
    assert {name for step in task.batches(0, 0, 1) for name in names_of(step)} == {
        open_sources(recipe.data.sources)[0][index].name for index in range(5)
    }
    with torch.no_grad():
        scores = task.validate().scores
        totals = []
        source = open_sources(recipe.data.validation)[0]
        for index in range(len(source)):
            sample = read_sample(source, index, base.speaker, base.model.config, 64)
            answers = sum(label != IGNORE for label in sample.spoken.labels)
            totals.append((loss_alone(base.model, sample).item(), answers))
    expected = sum(loss for loss, _ in totals) / sum(weight for _, weight in totals)
    assert scores["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_run_validates_and_keeps_the_best(tmp_path: Path) -> None:
    recipe = recipe_for(write_set(tmp_path / "set", 9), data={"validation_samples": 3}, save=SaveRecipe(every=2))
    events: list[Event] = []
    tune(recipe, base_of(), tmp_path / "run", events.append)
    assert [event.step for event in events if isinstance(event, ValidationEvent)] == [2, 3]


@pytest.mark.parametrize("what", ["projector", "full", "lora"])
def test_checkpoints_hold_what_learned_and_what_did_not(tmp_path: Path, what: str) -> None:
    recipe = recipe_for(write_set(tmp_path / "set"), what=what, checkpoint_activations=True)
    base = base_of()
    before = {name: each.clone() for name, each in base.model.state_dict().items()}
    weights = load_checkpoint(tune(recipe, base, tmp_path / "run", silent)).state_dict()
    assert weights.keys() == before.keys()
    moved = {name.split(".")[0] for name, each in weights.items() if not torch.equal(each, before[name])}
    assert moved == {"projector", "summary"} | (set() if what == "projector" else {"decoder"})


def test_adapters_are_merged_into_what_they_adapt(tmp_path: Path) -> None:
    recipe = recipe_for(write_set(tmp_path / "set"), what="lora", lora=LoraRecipe(rank=4, alpha=8, dropout=0.1))
    task = task_of(recipe, tmp_path)
    decoder = {name for name, each in task.module.named_parameters() if each.requires_grad and ".decoder." in name}
    assert decoder
    assert all(".lora_" in name for name in decoder)
    with torch.no_grad():
        for name, each in task.module.named_parameters():
            if ".lora_B." in name:  # zero at first
                each.normal_(std=0.1)
    task.write_checkpoint(tmp_path / "checkpoint", task.module.state_dict())
    merged, adapted = load_checkpoint(tmp_path / "checkpoint"), task.module.eval()
    for step in task.batches(0, 0, 1):
        for batch in step:
            # fp32: one product of matrices against two.
            torch.testing.assert_close(TuneModule(merged)(batch).total, adapted(batch).total, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_tiles_are_runs_of_their_own(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", 3)
    Image.new("RGB", (90, 60), (9, 200, 80)).save(tmp_path / "set" / "0.png")
    recipe = recipe_for(path, data={"group_by_length": False}, optim={"steps": 2, "batch_size": 4})
    events: list[Event] = []
    tune(recipe, base_of(TILED, tiled=True), tmp_path / "run", events.append)
    step = next(event for event in events if isinstance(event, StepEvent))
    assert step.visual_rows == step.visual_plain > 3 * 4


def test_recipes_that_learn_otherwise_do_not_go_on_from_each_other(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set")
    recipe = recipe_for(path, optim={"steps": 2})
    tune(recipe, base_of(), tmp_path / "run", silent)
    other = replace(recipe, optim=replace(recipe.optim, learning_rate=1e-4))
    with pytest.raises(TrainError, match="another"):
        tune(other, base_of(), tmp_path / "run", silent)
    tune(other, base_of(), tmp_path / "run", silent, fresh=True)


def test_adapters_do_not_go_on_upon_another_base(tmp_path: Path) -> None:
    recipe = recipe_for(write_set(tmp_path / "set"), what="lora", optim={"steps": 2})
    tune(recipe, base_of(), tmp_path / "run", silent)
    with pytest.raises(TrainError, match="belongs to another base; use another folder, or start anew"):
        tune(recipe, replace(base_of(), identity="other weights"), tmp_path / "run", silent)


@pytest.mark.parametrize(
    ("data", "words"), [({"max_broken": 9}, "no sample that can be shown"), ({"validation_samples": 5}, "none is left")]
)
def test_nothing_to_train_on_is_said(tmp_path: Path, data: dict[str, Any], words: str) -> None:
    path = write_set(tmp_path / "set", 4)
    if "max_broken" in data:
        path = write_lines(tmp_path / "set" / "set.jsonl", [asked("<image>\nwhat", image="none.png")] * 3)
    with pytest.raises(PlanError, match=words):
        tune(recipe_for(path, data=data), base_of(), tmp_path / "run", silent)
