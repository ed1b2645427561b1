"""What a run has told so far, for whoever shows it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from skipvision.training.events import (
    BrokenEvent,
    DoneEvent,
    Event,
    SavedEvent,
    Seconds,
    StageEvent,
    StepEvent,
    ValidationEvent,
)
from skipvision.training.run_log import RunLog

_RECENT = 20
"""Steps that speeds are means of."""
_SMOOTHING = 0.95
"""What stays of the smoothed loss at each step."""


@dataclass
class RunFacts:
    """Takes the events of a run, and knows where it stands."""

    stage: StageEvent | None = None
    """What goes on beside the steps; None where nothing does."""
    step: StepEvent | None = None
    """The last one."""
    first_step: int = 0
    """The first step of this process's life; 0 before it."""
    smoothed: float = math.nan
    losses: list[float] = field(default_factory=list)
    """Smoothed, one a step of this process's life."""
    samples: int = 0
    tokens: int = 0
    visual_kept: int = 0
    visual_plain: int = 0
    seconds: Seconds = field(default_factory=Seconds)
    validation: ValidationEvent | None = None
    best: ValidationEvent | None = None
    saved: SavedEvent | None = None
    broken: int = 0
    done: DoneEvent | None = None
    # Replaced and never changed, because the panel is drawn in a thread of its own.
    _recent: tuple[StepEvent, ...] = ()

    def __call__(self, event: Event) -> None:
        """Takes the next event."""
        if isinstance(event, StageEvent):
            self.stage = event if event.done < event.total else None
        elif isinstance(event, StepEvent):
            self._take_step(event)
        elif isinstance(event, ValidationEvent):
            self.validation = event
            self.best = event if event.best else self.best
        elif isinstance(event, BrokenEvent):
            self.broken = event.count
        elif isinstance(event, SavedEvent):
            self.saved = event
        else:
            self.done = event

    def _take_step(self, event: StepEvent) -> None:
        self.stage = None
        self.step = event
        self.first_step = self.first_step or event.step
        last = self.smoothed
        if math.isfinite(event.loss):  # or else all samples of the step are broken
            self.smoothed = event.loss if math.isnan(last) else _SMOOTHING * last + (1 - _SMOOTHING) * event.loss
        self.losses.append(self.smoothed)
        self.samples += event.samples
        self.tokens += tokens_of(event)
        self.visual_kept += event.visual_kept
        self.visual_plain += event.visual_plain
        parts = ((each.name, getattr(self.seconds, each.name), getattr(event.seconds, each.name)) for each in _PARTS)
        self.seconds = Seconds(**{name: before + more for name, before, more in parts})
        self._recent = (*self._recent, event)[-_RECENT:]

    @property
    def tokens_per_second(self) -> float:
        """Over the last steps; see `tokens_of`."""
        return self._rate(sum(map(tokens_of, self._recent)))

    @property
    def rows_per_second(self) -> float:
        """Rows that were computed, over the last steps."""
        return self._rate(sum(event.rows for event in self._recent))

    def _rate(self, count: int) -> float:
        seconds = sum(event.seconds.total for event in self._recent)
        return count / seconds if seconds else 0.0

    @property
    def resumable_step(self) -> int:
        """The step that a run which stops now goes on from; 0 where it begins anew."""
        return self.saved.step if self.saved else max(0, self.first_step - 1)


_PARTS = fields(Seconds)


def tokens_of(event: StepEvent) -> int:
    """Text and visual tokens as the plain model has them, so that runs that skip and runs that do not compare."""
    return event.rows - event.visual_rows + event.visual_plain


def time_split(seconds: Seconds) -> list[tuple[str, float, float]]:
    """Name, seconds and share of each part."""
    total = seconds.total or 1.0
    return [(each.name, getattr(seconds, each.name), getattr(seconds, each.name) / total) for each in _PARTS]


@dataclass(frozen=True)
class History:
    """A run's log, of all its lives."""

    steps: list[int]
    losses: list[float]
    learning_rates: list[float]
    validations: list[tuple[int, dict[str, float]]]

    def best_loss(self) -> tuple[int, float] | None:
        """Step and loss of the best validation."""
        scored = [(scores["loss"], step) for step, scores in self.validations if "loss" in scores]
        return (min(scored)[1], min(scored)[0]) if scored else None


def read_history(log: Path) -> History:
    """Of a run's log.jsonl; empty where there is none."""
    history = History([], [], [], [])
    for found in RunLog(log).rows():
        if found.get("event") == "validation":
            history.validations.append((found["step"], {name: _number(each) for name, each in found["scores"].items()}))
        elif found.get("event") == "step":
            history.steps.append(found["step"])
            history.losses.append(_number(found["loss"]))
            history.learning_rates.append(_number(found["learning_rate"]))
    return history


def _number(value: float | None) -> float:
    return math.nan if value is None else value
