"""A run that computes nothing, and tells what a run tells; it goes on where it was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skipvision.training.conversation import Broken
from skipvision.training.events import (
    BrokenEvent,
    DoneEvent,
    Event,
    Report,
    SavedEvent,
    Seconds,
    StageEvent,
    StepEvent,
    ValidationEvent,
)
from skipvision.training.run_log import row
from skipvision.training.tune_recipe import TuneRecipe

RECIPE = """\
base = "BASE"

[[data.sources]]
path = "train.json"

[optim]
steps = 40

[save]
every = 10
"""
EVIL = "one.json, sample 3 (\x1b[31mevil)"


def step_event(step: int, total: int = 40, loss: float | None = None) -> StepEvent:
    return StepEvent(
        step=step,
        total=total,
        loss=3.0 / (1 + step / 10) if loss is None else loss,
        learning_rate=2e-5 * (1 - step / (total + 1)),
        grad_norm=1.25,
        samples=4,
        rows=1000,
        answer_tokens=100,
        visual_rows=680,
        visual_kept=392,
        visual_plain=1024,
        seconds=Seconds(0.1, 0.3, 0.5, 0.1),
        memory=3 << 30,
        seconds_left=float(total - step),
    )


def events(recipe: TuneRecipe, output: Path, first: int) -> Iterator[Event]:
    """Of a run that has `first` steps behind it."""
    for done in (0, 1, 2):
        yield StageEvent("looking at the data", done, 2)
    total, checkpoint = recipe.optim.steps, output / "checkpoint"
    if not first:
        yield BrokenEvent(Broken(EVIL, "no such picture: a.jpg"), 1)
    for step in range(first + 1, total + 1):
        yield step_event(step, total)
        if step % recipe.save.every == 0:
            yield ValidationEvent(step, {"loss": 3.1 / (1 + step / 10)}, best=True)
            yield SavedEvent(step, output / "states" / f"{step}")
    life = total - first
    yield DoneEvent(
        checkpoint, total, 0.6, total, Seconds(0.1 * life, 0.3 * life, 0.5 * life, 0.1 * life), 1000 * life, 1
    )


class FakeTraining:
    """In place of `tune`; `pause` is how many seconds a step takes, and `stop` raises at a step, or does not.

    The step behind `last` does not end.
    """

    def __init__(
        self, pause: float = 0.0, stop: Callable[[Event], None] = lambda _event: None, last: int | None = None
    ) -> None:
        self.pause, self.stop, self.last = pause, stop, last

    def __call__(self, recipe: TuneRecipe, _base: object, output: Path, report: Report, *, fresh: bool = False) -> Path:
        state, log = output / "state", output / "log.jsonl"
        first = int(state.read_text()) if state.exists() and not fresh else 0
        before = [json.loads(line) for line in log.read_text().splitlines()] if first else []
        rows = [each for each in before if each.get("step", 0) <= first]
        log.write_text("".join(json.dumps(each) + "\n" for each in rows))
        with log.open("a") as file:
            for event in events(recipe, output, first):
                if isinstance(event, StepEvent):
                    time.sleep(600 if event.step - 1 == self.last else self.pause)
                self.stop(event)
                if not isinstance(event, StageEvent):
                    file.write(json.dumps(row(event)) + "\n")
                    file.flush()
                if isinstance(event, SavedEvent):
                    state.write_text(str(event.step))
                report(event)
        return output / "checkpoint"


def install(patch: pytest.MonkeyPatch, run: FakeTraining) -> None:
    patch.setattr(
        "svcli_export.tuning.read_base", lambda _folder, _recipe, progress: progress("reading the model", 1.0)
    )
    patch.setattr("skipvision.training.tune.tune", run)
    patch.setattr("svcli.commands.train.model_folder", lambda name, **_: Path(name))
