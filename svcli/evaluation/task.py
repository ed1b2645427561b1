"""What a task is: items with pictures and a question, how an answer is read, and what it scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Item:
    """One question."""

    id: str
    """Stable from run to run, and unique in its split."""
    question: str
    """All of what is asked, as the task's official script words it."""
    pictures: tuple[Path | bytes, ...]
    """Files, or what is in them; read when it is the item's turn."""
    truth: Any
    """What the metric needs, as JSON: an answer, several, or options."""
    group: str = ""
    """A category whose score is reported by itself."""


@dataclass(frozen=True)
class Judged:
    """An answered item."""

    item: Item
    said: str
    """As the model said it."""
    answer: str
    """What was read out of it."""
    score: float
    """0 to 1, as the task counts."""


class Task(Protocol):
    """Stateless: every method may be called in any order, and in several processes."""

    name: str
    """As the command line says it."""
    title: str
    """As its authors call it, with the year."""
    source: str
    """Where its files come from, and under which licence."""
    layout: str
    """Which files must lie in its folder; a few words for each form that is read."""
    splits: tuple[str, ...]
    """The first is the default."""
    metric: str
    """Name of the main figure of `summary`."""
    max_new_tokens: int
    """How long an answer may get, as its official script allows."""

    def items(self, folder: Path, split: str) -> Iterator[Item]:
        """In a fixed order. Raises TaskError for files that are missing or wrong."""
        ...

    def read(self, item: Item, said: str) -> str:
        """The answer in what was said."""
        ...

    def score(self, item: Item, answer: str) -> float:
        """0 to 1."""
        ...

    def summary(self, judged: Sequence[Judged]) -> dict[str, float]:
        """The main figure under the name `metric`, in the unit of its official script, and others beside it.

        Groups are named `group: NAME`. Of an incomplete run, what is there counts.
        """
        ...


class TaskError(ValueError):
    """A task whose files are not as they should be; one sentence that says which and where to get them."""


def is_scored(task: Task, split: str) -> bool:
    """Whether there is a figure of this split, or only somebody else can tell."""
    return not (isinstance(task, Exports) and split in task.unscored)


@runtime_checkable
class Exports(Protocol):
    """What some tasks can do besides: write answers for a judge or a test server elsewhere."""

    unscored: tuple[str, ...]
    """Splits that only they score: of these `score` is 0 and `summary` is empty."""
    export: str
    """What kind of file that is, its ending with it, and who reads it; a few words."""

    def exported(self, judged: Sequence[Judged]) -> str | bytes:
        """What is in it."""
        ...
