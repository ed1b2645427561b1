"""What repeated times say: their middle, their slow end, and ratios with the interval that the repetitions allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Literal

import numpy as np
import numpy.typing as npt

FEWEST = 10
"""Rounds below which no verdict is given: resampling so few of them makes intervals that are too narrow."""
_RESAMPLES = 10_000
_CHANCE = 0.05

Verdict = Literal["lower", "higher", "open"]


@dataclass(frozen=True)
class Spread:
    """Of values that were measured again and again."""

    p50: float
    p95: float


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians, and the middle 95 % of what resampled rounds give."""

    ratio: float
    low: float
    high: float

    def verdict(self, num_rounds: int) -> Verdict:
        """`lower` or `higher` than 1 where the interval leaves 1 out and there are rounds enough; else `open`."""
        if num_rounds < FEWEST:
            return "open"
        return "lower" if self.high < 1 else "higher" if self.low > 1 else "open"


def spread(values: Sequence[float]) -> Spread:
    p50, p95 = np.percentile(values, (50, 95)).tolist()
    return Spread(p50=p50, p95=p95)


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Of rounds in which both were measured side by side: they are drawn in pairs, so that what slowed down a whole
    round counts on both sides. The same values give the same interval."""
    rounds = _draws(np.random.default_rng(0), len(numerators))
    return _ratio(numerators, denominators, _medians(numerators, rounds), _medians(denominators, rounds))


def unpaired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Of values that were measured apart. The same values give the same interval."""
    source = np.random.default_rng(0)
    above = _medians(numerators, _draws(source, len(numerators)))
    return _ratio(numerators, denominators, above, _medians(denominators, _draws(source, len(denominators))))


def halves_agree(numerators: Sequence[float], denominators: Sequence[float]) -> bool:
    """Whether the ratio of medians is on the same side of 1 in the earlier and in the later half of the rounds. What a
    busy machine does lasts for several rounds, which resampling single ones does not see."""
    half = len(numerators) // 2
    if half == 0:
        return False
    earlier = np.median(numerators[:half]) / np.median(denominators[:half])
    later = np.median(numerators[-half:]) / np.median(denominators[-half:])
    return bool((earlier < 1 and later < 1) or (earlier > 1 and later > 1))


def rounds_agree(numerators: Sequence[float], denominators: Sequence[float]) -> bool:
    """The sign test: whether more rounds lie on one side of 1 than a fair coin would put there in 95 of 100 runs. A few
    rounds that something else disturbed move a median far, and count here as one each."""
    pairs = [(above, below) for above, below in zip(numerators, denominators, strict=True) if above != below]
    count, lower = len(pairs), sum(above < below for above, below in pairs)
    fewer = min(lower, count - lower)
    by_chance: float = 2 * sum(comb(count, each) for each in range(fewer + 1)) / 2**count
    return by_chance <= _CHANCE


def drift(values: Sequence[float]) -> float:
    """How far the median of the later half is from that of the earlier one, as a share of it; 0 of fewer than 4."""
    half = len(values) // 2
    if half < 2:
        return 0.0
    earlier, later = float(np.median(values[:half])), float(np.median(values[-half:]))
    return abs(later / earlier - 1)


def _draws(source: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
    return source.integers(count, size=(_RESAMPLES, count))


def _medians(values: Sequence[float], rounds: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    medians: npt.NDArray[np.float64] = np.median(np.asarray(values, np.float64)[rounds], axis=1)
    return medians


def _ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    above: npt.NDArray[np.float64],
    below: npt.NDArray[np.float64],
) -> Ratio:
    low, high = np.percentile(above / below, (2.5, 97.5)).tolist()
    return Ratio(ratio=float(np.median(numerators) / np.median(denominators)), low=low, high=high)
