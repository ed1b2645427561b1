"""How far a figure of so many items can be trusted: intervals of 95 %."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from typing import Literal

import numpy as np
import numpy.typing as npt

from svcli.evaluation.results import Line
from svcli.evaluation.task import Judged, Task

RESAMPLES = 1000
LEAST_DIFFERING = 6
"""Pictures: of five, all to the same side by chance is no rarer than 6 % (2 of 2**5)."""
_Z = 1.959964
_TRIED = 4
"""Resamples by which a figure that is a mean is told from one that is not."""

Floats = npt.NDArray[np.float64]
Method = Literal["Wilson", "bootstrap over pictures"]


@dataclass(frozen=True)
class Interval:
    """A figure with the interval around it."""

    value: float
    low: float
    high: float
    method: Method

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


class Sample:
    """Answers to some items, and what the task makes of them.

    Questions about one picture fail together, so pictures are drawn, with all their questions.
    """

    def __init__(self, task: Task, lines: Sequence[Line]) -> None:
        """`lines` are not empty."""
        self._task = task
        # In an order of their own, so that two askers are drawn the same pictures.
        self._judged = [line.judged for line in sorted(lines, key=lambda line: line.item.id)]
        keys = [line.pictures for line in sorted(lines, key=lambda line: line.item.id)]
        self._clusters = np.unique(keys, return_inverse=True)[1].reshape(-1)
        self.num_pictures = int(self._clusters.max()) + 1
        self._copies = [self._judged]
        self.summary = task.summary(self._judged)
        """Empty where only somebody else can tell."""
        self.ids = frozenset(each.item.id for each in self._judged)

    @property
    def value(self) -> float:
        """The main figure. Raises KeyError where there is none."""
        return self.summary[self._task.metric]

    def interval(self) -> Interval | None:
        """None where it cannot be told: of one picture, or where all draws of a figure that is no mean agree."""
        scale, total = self._scale, len(self._judged)
        if scale is not None and set(self._scores) <= {0.0, 1.0}:
            if self.num_pictures == total:
                return self._wilson(total, scale)
            if float(np.ptp(self.draws)) == 0:
                # All right, or all wrong: nothing to draw from, and no proof. Pictures count, not questions.
                return self._wilson(self.num_pictures, scale)
        if self.num_pictures < 2 or float(np.ptp(self.draws)) == 0:
            return None
        low, high = np.percentile(self.draws, (2.5, 97.5)).tolist()
        return Interval(self.value, low, high, "bootstrap over pictures")

    def over(self, other: Sample) -> Interval | None:
        """How much this is above `other`, which answered the same items; None where it cannot be told: of one picture,
        or where all draws of a figure that is no mean agree.

        It includes zero where fewer than LEAST_DIFFERING pictures were answered otherwise.
        """
        assert self.ids == other.ids
        draws, value = self.draws - other.draws, self.value - other.value
        method: Method = "bootstrap over pictures"
        agree = bool(np.ptp(draws) < 1e-9)
        if self.num_pictures < 2 or (agree and self._scale is None):
            return None
        if agree and self._scale is not None:
            # Nothing to draw from. Of other pictures, as many as Wilson allows may differ by all there is, either way.
            others = _Z**2 / (self.num_pictures + _Z**2)
            low, high = ((1 - others) * value + side * others * self._scale for side in (-1, 1))
            low, high, method = max(low, -self._scale), min(high, self._scale), "Wilson"
        else:
            low, high = np.percentile(draws, (2.5, 97.5)).tolist()
        if len(np.unique(self._clusters[self._scores != other._scores])) < LEAST_DIFFERING:
            low, high = min(low, 0.0), max(high, 0.0)
        return Interval(value, low, high, method)

    @cached_property
    def draws(self) -> Floats:
        """[RESAMPLES] the figure, of as many pictures drawn with replacement."""
        generator = np.random.default_rng(0)
        if self._scale is None:
            return np.array([self._drawn(self._draw(generator)) for _ in range(RESAMPLES)])
        sizes = np.bincount(self._clusters).astype(np.float64)
        sums = np.bincount(self._clusters, weights=self._scores)
        found = []
        for _ in range(RESAMPLES):
            counts = self._draw(generator)
            found.append(self._scale * float(counts @ sums) / float(counts @ sizes))
        return np.array(found)

    @cached_property
    def _scale(self) -> float | None:
        """1 or 100 where the figure is the mean of the scores in that unit, and else None."""
        if not self._scores.any():
            # Nothing is nothing in every unit; what all right would be tells.
            figure = self._task.summary([replace(each, score=1.0) for each in self._judged])[self._task.metric]
            return next((scale for scale in (1.0, 100.0) if abs(scale - figure) < 1e-6), None)
        generator = np.random.default_rng(1)
        weights = [np.ones(self.num_pictures, np.int64), *(self._draw(generator) for _ in range(_TRIED))]
        means = [float(np.average(self._scores, weights=each[self._clusters])) for each in weights]
        figures = [self._drawn(each) for each in weights]
        for scale in (1.0, 100.0):
            if all(abs(scale * mean - figure) < 1e-6 for mean, figure in zip(means, figures, strict=True)):
                return scale
        return None

    @cached_property
    def _scores(self) -> Floats:
        return np.array([each.score for each in self._judged])

    def _draw(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """[num_pictures] how often each is drawn."""
        return np.bincount(generator.integers(self.num_pictures, size=self.num_pictures), minlength=self.num_pictures)

    def _drawn(self, counts: npt.NDArray[np.int64]) -> float:
        most, times = int(counts.max()), counts[self._clusters]
        while len(self._copies) < most:
            self._copies.append([_copy(each, len(self._copies)) for each in self._judged])
        drawn = [
            self._copies[number][place] for number in range(most) for place in np.flatnonzero(times > number).tolist()
        ]
        return self._task.summary(drawn)[self._task.metric]

    def _wilson(self, count: int, scale: float) -> Interval:
        share = float(self._scores.mean())
        middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
        reach = _Z * sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / (1 + _Z**2 / count)
        return Interval(self.value, scale * max(0.0, middle - reach), scale * min(1.0, middle + reach), "Wilson")


def _copy(judged: Judged, number: int) -> Judged:
    """An item that is drawn again is another: what a task pairs by id stays in pairs."""
    return replace(judged, item=replace(judged.item, id=f"{number}~{judged.item.id}"))
