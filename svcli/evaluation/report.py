"""What came of a run: a figure with its interval for each asker, groups, costs, and what may be said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean, median
from typing import Any

from svcli.chat.model import DENSE
from svcli.evaluation.asker import Said
from svcli.evaluation.intervals import Interval, Sample
from svcli.evaluation.results import Line
from svcli.evaluation.task import Exports, Task, is_scored

_GROUP = "group: "
_FEW_PICTURES = 30
"""With fewer, drawing them misses the truth clearly more often than one time in twenty."""


@dataclass(frozen=True)
class Answers:
    """Of one asker."""

    task: Task
    name: str
    lines: tuple[Line, ...]
    num_items: int
    """How many it is to answer in all."""

    @property
    def num_failed(self) -> int:
        """Items that could not be asked, and count as wrong."""
        return sum(line.said is None for line in self.lines)

    @property
    def all_failed(self) -> bool:
        """Whether nothing could be asked."""
        return self.num_failed == len(self.lines)

    @cached_property
    def sample(self) -> Sample:
        return Sample(self.task, self.lines)

    @property
    def value(self) -> float | None:
        """The main figure; None where only somebody else can tell."""
        return self.sample.summary.get(self.task.metric)

    @cached_property
    def interval(self) -> Interval | None:
        return None if self.value is None else self.sample.interval()

    @property
    def groups(self) -> dict[str, float]:
        """The figure of each group."""
        found = self.sample.summary.items()
        return {name.removeprefix(_GROUP): value for name, value in found if name.startswith(_GROUP)}

    @property
    def others(self) -> dict[str, float]:
        """Figures beside the main one."""
        found = self.sample.summary.items()
        return {name: value for name, value in found if not name.startswith(_GROUP) and name != self.task.metric}

    def mean(self, name: str) -> float | None:
        """Of a field of Said; None where nothing could be asked."""
        return fmean(getattr(each, name) for each in self._said) if self._said else None

    @property
    def first_token(self) -> float | None:
        """Median seconds, of the items whose pictures were looked at."""
        seconds = [line.said.first_token for line in self.lines if line.said is not None and line.looked]
        return median(seconds) if seconds else None

    def over(self, other: Answers) -> Interval | None:
        """How much its figure is above that of `other` on the items that both answered; None where it says nothing."""
        if self.value is None or other.value is None:
            return None
        if self.sample.ids == other.sample.ids:
            return self.sample.over(other.sample)
        common = self.sample.ids & other.sample.ids
        if not common:
            return None
        mine, theirs = ([line for line in each.lines if line.item.id in common] for each in (self, other))
        return Sample(self.task, mine).over(Sample(self.task, theirs))

    @cached_property
    def _said(self) -> tuple[Said, ...]:
        return tuple(line.said for line in self.lines if line.said is not None)


@dataclass(frozen=True)
class Report:
    """Of a run, or of what is there of one. The first asker is the bundle as it is."""

    task: Task
    split: str
    answers: tuple[Answers, ...]

    @staticmethod
    def of(task: Task, split: str, lines: Mapping[str, Sequence[Line]], num_items: int) -> Report:
        """`lines` by asker; those that have none are left out."""
        found = (Answers(task, name, tuple(each), num_items) for name, each in lines.items() if each)
        return Report(task, split, tuple(found))

    @cached_property
    def to_dense(self) -> dict[str, Interval | None]:
        """How much each is above dense graphs, where these were asked."""
        dense = next((each for each in self.answers if each.name == DENSE), None)
        if dense is None:
            return {}
        return {each.name: each.over(dense) for each in self.answers if each is not dense}

    @cached_property
    def to_own(self) -> dict[str, Interval | None]:
        """How much the bundle as it is, the first, is above each other."""
        return {each.name: self.answers[0].over(each) for each in self.answers[1:]}

    @property
    def is_scored(self) -> bool:
        return is_scored(self.task, self.split)

    def sentences(self) -> list[str]:
        """What the differences say, and what must be known beside."""
        metric, found = self.task.metric, []
        if isinstance(self.task, Exports) and not self.is_scored:
            found.append(f"Figures of {self.split} are given elsewhere; --export writes {self.task.export}.")
        for name, difference in self.to_own.items() if self.is_scored else ():
            pair = f"{self.answers[0].name} and {name}"
            if difference is None:
                found.append(f"{pair}: too little was answered by both to tell them apart.")
            elif difference.excludes_zero:
                above = difference.value > 0
                low, high = sorted(map(abs, (difference.low, difference.high)))
                found.append(
                    f"{self.answers[0].name} is {'above' if above else 'below'} {name} by"
                    f" {figure(abs(difference.value))} ({figure(low)} to {figure(high)}) in {metric}."
                )
            else:
                found.append(
                    f"{pair}: no difference is shown in {metric}"
                    f" ({figure(difference.low)} to {figure(difference.high)})."
                )
        found += [*self.few(), *self.failed()]
        for each in self.answers:
            if len(each.lines) < each.num_items:
                found.append(f"{each.name}: {len(each.lines)} of {each.num_items} items are answered so far.")
        return found

    def few(self) -> list[str]:
        """What must be known of intervals around so few pictures."""
        drawn = [each for each in (*self.to_own.values(), *(one.interval for one in self.answers)) if each is not None]
        if all(each.method == "Wilson" for each in drawn):
            return []
        count = min(each.sample.num_pictures for each in self.answers)
        if count >= _FEW_PICTURES:
            return []
        return [f"Of {count} pictures alone, drawing them tells too narrow intervals: ask about hundreds."]

    def failed(self) -> list[str]:
        """Who could not be asked everything."""
        return [
            f"{each.name}: {each.num_failed} of {len(each.lines)} could not be asked, and count as wrong."
            for each in self.answers
            if each.num_failed
        ]

    def told(self) -> dict[str, Any]:
        """For programs."""
        return {
            "task": self.task.name,
            "split": self.split,
            "metric": self.task.metric,
            "askers": {each.name: self._told(each) for each in self.answers},
            "sentences": self.sentences(),
        }

    def _told(self, each: Answers) -> dict[str, Any]:
        to_dense, to_own = self.to_dense.get(each.name), self.to_own.get(each.name)
        return {
            "items": each.num_items,
            "answered": len(each.lines),
            "not asked": each.num_failed,
            "figure": each.value,
            "interval": None if each.interval is None else asdict(each.interval),
            "figures": each.sample.summary,
            "above dense": None if to_dense is None else asdict(to_dense),
            "own above it": None if to_own is None else asdict(to_own),
            "visual_tokens": each.mean("visual_tokens"),
            "cached_rows": each.mean("cached_rows"),
            "flops": each.mean("flops"),
            "first_token_seconds": each.first_token,
        }


def figure(value: float | None) -> str:
    """As many digits as say something."""
    if value is None:
        return "-"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
