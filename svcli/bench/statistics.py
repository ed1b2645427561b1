"""What repeated times say: their middle, their slow end, and ratios with the interval that the repetitions allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import Literal

import numpy as np
import numpy.typing as npt

FEWEST = 10
"""Rounds below which no verdict is given: resampling so few of them makes intervals that are too narrow."""
CHANCE = 0.05
"""Of a wrong verdict, or of one at all among figures that are read together."""
_RESAMPLES = 10_000
_MORE_RESAMPLES = 40_000
"""Where a tail is cut thinner: of 32 intervals, 31 of them lie beyond each end of one."""

Verdict = Literal["lower", "higher", "open"]


@dataclass(frozen=True)
class Spread:
    """Of values that were measured again and again."""

    p50: float
    p95: float


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians, and the middle 95 % of what resampled rounds give; more of it where several are read
    together."""

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
    count = len(numerators)
    rounds = np.random.default_rng(0).integers(count, size=(_RESAMPLES, count))
    return _ratio(numerators, denominators, _medians(numerators, rounds), _medians(denominators, rounds))


def unpaired_ratio(numerators: Sequence[float], denominators: Sequence[float], num_compared: int = 1) -> Ratio:
    """Of values that were measured apart. The same values give the same interval.

    `num_compared`: how many such ratios are read together. Each interval is as wide as Bonferroni's bound asks, so that
    all of them hold what they claim in 95 of 100 cases.
    """
    above, below = _apart(numerators, seed=0), _apart(denominators, seed=1)
    return _ratio(numerators, denominators, above, below, CHANCE / num_compared)


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
    return by_chance <= CHANCE


def drift(values: Sequence[float]) -> float:
    """How far the median of the later half is from that of the earlier one, as a share of it; 0 of fewer than 4."""
    half = len(values) // 2
    if half < 2:
        return 0.0
    earlier, later = float(np.median(values[:half])), float(np.median(values[-half:]))
    return abs(later / earlier - 1)


def _medians(values: Sequence[float], rounds: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    medians: npt.NDArray[np.float64] = np.median(np.asarray(values, np.float64)[rounds], axis=1)
    return medians


def _apart(values: Sequence[float], *, seed: int) -> npt.NDArray[np.float64]:
    """Medians of resampled values."""
    ordered = np.sort(np.asarray(values, np.float64))
    lower, upper = _middles(len(values), seed)
    medians: npt.NDArray[np.float64] = (ordered[lower] + ordered[upper]) / 2
    return medians


@lru_cache
def _middles(count: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which of `count` ordered values stand in the middle of each resample: the same ones, whatever the values are."""
    drawn = np.random.default_rng(seed).integers(count, size=(_MORE_RESAMPLES, count))
    drawn.sort(axis=1)
    return drawn[:, (count - 1) // 2].copy(), drawn[:, count // 2].copy()


def _ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    above: npt.NDArray[np.float64],
    below: npt.NDArray[np.float64],
    chance: float = CHANCE,
) -> Ratio:
    low, high = np.quantile(above / below, (chance / 2, 1 - chance / 2)).tolist()
    return Ratio(ratio=float(np.median(numerators) / np.median(denominators)), low=low, high=high)
