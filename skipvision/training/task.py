"""What the loop asks of whatever is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from skipvision.training.conversation import Broken


@dataclass(frozen=True)
class Objective:
    """What one micro-batch adds to the step."""

    total: Tensor
    """Scalar: a sum over whatever `weight` counts; its gradient is taken."""
    weight: float
    """A step's gradient is the sum of all totals by the sum of all weights, over micro-batches and processes."""
    answer_loss: Tensor
    """Scalar, likewise a sum: what is shown as the loss."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Other losses to show, likewise sums."""


@dataclass(frozen=True)
class Counts:
    """Of one micro-batch; what `StepEvent` says of them."""

    samples: int = 0
    rows: int = 0
    answer_tokens: int = 0
    visual_rows: int = 0
    visual_kept: int = 0
    visual_plain: int = 0


@dataclass(frozen=True)
class Validation:
    """What one process found."""

    scores: Mapping[str, float] = field(default_factory=dict)
    """The same in all processes; by `loss`, where it is among them, the best is known. Empty where there is nothing to
    validate on."""
    broken: Sequence[Broken] = ()
    """Samples that had to be left out."""


class MicroBatch(Protocol):
    """What `Task.module` takes, on the CPU."""

    @property
    def counts(self) -> Counts: ...
    @property
    def names(self) -> Sequence[str]:
        """Of its samples."""

    @property
    def broken(self) -> Sequence[Broken]:
        """Samples that had to be left out."""


class Task(Protocol):
    """One kind of training. Everything random in it comes from (seed, step), so that a run can go on anywhere."""

    module: nn.Module
    """Called with a micro-batch; returns its Objective. All that learns is in it, and may be sharded: so it calls each
    decoder layer as often as in any other process, even for a micro-batch without samples."""

    @property
    def num_steps(self) -> int: ...

    def parameter_groups(self) -> list[dict[str, object]]:
        """For AdamW; `lr` of each is the peak of its schedule."""

    def batches(self, first_step: int, rank: int, world: int) -> Iterator[Sequence[MicroBatch]]:
        """Of each step from `first_step` on, this process's micro-batches; as many in all processes."""

    def validate(self) -> Validation:
        """Called in all processes."""

    def write_checkpoint(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Writes what `svcli export` takes, in the first process; `state` are whole tensors by the names of `module`'s
        state dict."""
