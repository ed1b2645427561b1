"""What a run tells of itself, for whoever draws or logs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from skipvision.training.conversation import Broken


@dataclass(frozen=True)
class StageEvent:
    """Something long beside the steps: reading the model, looking at the data."""

    what: str
    done: float
    total: float


@dataclass(frozen=True)
class Seconds:
    """Where the time went."""

    data: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    optimiser: float = 0.0
    """With clipping, and waiting for other processes."""
    other: float = 0.0
    """Validation and saving."""

    @property
    def total(self) -> float:
        return self.data + self.forward + self.backward + self.optimiser + self.other


@dataclass(frozen=True)
class StepEvent:
    """One step, over all processes."""

    step: int
    """Steps done."""
    total: int
    loss: float
    """Per token of the answers, in nats; NaN where all samples of the step are broken, which changes nothing."""
    learning_rate: float
    """The largest of all groups."""
    grad_norm: float
    """Before clipping."""
    samples: int
    rows: int
    """All rows, padding left out."""
    answer_tokens: int
    visual_rows: int
    """Of `rows`."""
    visual_kept: int
    """Of those, what passes the FFN."""
    visual_plain: int
    """Visual rows that the plain model would have had."""
    seconds: Seconds
    memory: int
    """Peak bytes of this process, or of its GPU."""
    seconds_left: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """Other losses, by name."""


@dataclass(frozen=True)
class ValidationEvent:
    """Scores on what is not trained on; `best` where none was better."""

    step: int
    scores: Mapping[str, float]
    best: bool


@dataclass(frozen=True)
class BrokenEvent:
    """A sample was left out."""

    broken: Broken
    count: int
    """So far."""


@dataclass(frozen=True)
class SavedEvent:
    """The run can go on from here."""

    step: int
    folder: Path


@dataclass(frozen=True)
class DoneEvent:
    """The end of a run."""

    checkpoint: Path
    steps: int
    loss: float
    """Mean over the last steps."""
    best_step: int
    seconds: Seconds
    """Of this process's life, not of runs before that were stopped."""
    rows: int
    broken: int
    chosen: str = ""
    """Which step the checkpoint is of, and why."""


Event = StageEvent | StepEvent | ValidationEvent | BrokenEvent | SavedEvent | DoneEvent
Report = Callable[[Event], None]
