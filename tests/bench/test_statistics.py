"""What is made of repeated times, and when something may be said of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svcli.bench.statistics import (
    FEWEST,
    Ratio,
    drift,
    halves_agree,
    paired_ratio,
    rounds_agree,
    spread,
    unpaired_ratio,
)

TIMES = st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=40)


def test_spread_of_known_values() -> None:
    found = spread(list(range(101)))
    assert (found.p50, found.p95) == (50, 95)


def test_paired_ratio_is_exact_where_one_is_a_multiple_of_the_other() -> None:
    dense = np.random.default_rng(0).lognormal(size=41)
    found = paired_ratio((dense / 4).tolist(), dense.tolist())
    assert (found.ratio, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))


def test_unpaired_ratio_knows_nothing_of_rounds() -> None:
    dense = np.random.default_rng(0).lognormal(size=41)
    found = unpaired_ratio((dense / 4).tolist(), dense.tolist())
    assert found.low < 0.24 < found.ratio < 0.26 < found.high


def test_interval_of_a_median_is_that_of_the_binomial() -> None:
    """Of 0..100 over 1: the median of a resample is between the order statistics that the binomial of 101 gives."""
    found = paired_ratio([float(each) for each in range(101)], [1.0] * 101)
    assert found.low == pytest.approx(40, abs=2)
    assert found.high == pytest.approx(60, abs=2)


@settings(max_examples=25, deadline=None)
@given(TIMES)
def test_the_ratio_lies_in_its_interval_and_the_interval_is_the_same_again(values: list[float]) -> None:
    others = values[::-1]
    for made in (paired_ratio, unpaired_ratio):
        found = made(values, others)
        assert found == made(values, others)
        assert found.low <= found.high
        assert min(values) / max(values) <= found.low * (1 + 1e-9)
        assert found.high <= max(values) / min(values) * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(TIMES, st.floats(0.01, 100))
def test_a_ratio_does_not_know_the_unit_of_time(values: list[float], unit: float) -> None:
    found, scaled = paired_ratio(values, values[::-1]), paired_ratio([each * unit for each in values], values[::-1])
    assert scaled.ratio == pytest.approx(found.ratio * unit)


@settings(max_examples=25, deadline=None)
@given(TIMES)
def test_equal_sides_are_one(values: list[float]) -> None:
    found = paired_ratio(values, values)
    assert (found.ratio, found.low, found.high) == (1, 1, 1)
    assert found.verdict(len(values)) == "open"


@pytest.mark.parametrize(
    ("low", "high", "rounds", "verdict"),
    [
        (0.5, 0.9, FEWEST, "lower"),
        (1.1, 1.2, FEWEST, "higher"),
        (0.9, 1.1, FEWEST, "open"),
        (0.5, 1.0, FEWEST, "open"),
        (0.5, 0.9, FEWEST - 1, "open"),
    ],
)
def test_a_verdict_stands_only_where_the_interval_leaves_one_out(
    low: float, high: float, rounds: int, verdict: str
) -> None:
    assert Ratio(ratio=(low + high) / 2, low=low, high=high).verdict(rounds) == verdict


def test_false_verdicts_on_equal_sides_are_as_rare_as_95_percent_says() -> None:
    source = np.random.default_rng(1)
    wrong = 0
    for _ in range(60):
        first, second = source.lognormal(0, 0.1, (2, 30)).tolist()
        wrong += paired_ratio(first, second).verdict(30) != "open"
    assert wrong <= 8


def test_halves_that_disagree_are_seen() -> None:
    assert halves_agree([1, 1, 1, 1], [2, 2, 2, 2])
    assert halves_agree([3, 3, 3, 3], [2, 2, 2, 2])
    assert not halves_agree([1, 1, 3, 3], [2, 2, 2, 2])
    assert not halves_agree([2, 2, 2, 2], [2, 2, 2, 2])
    assert not halves_agree([1], [2])


def test_the_sign_test_is_that_of_the_binomial() -> None:
    """Of 10 rounds 9 are needed: 2 * (1 + 10) / 1024 = 0.021, but 2 * (1 + 10 + 45) / 1024 = 0.109."""
    for lower, agree in ((10, True), (9, True), (8, False), (5, False), (1, True)):
        first = [1.0] * lower + [3.0] * (10 - lower)
        assert rounds_agree(first, [2.0] * 10) == agree
    assert not rounds_agree([2.0] * 10, [2.0] * 10)
    assert not rounds_agree([1.0] * 5, [2.0] * 5)


def test_drift_is_between_the_halves() -> None:
    assert drift([1, 1, 1, 1, 2, 2, 2, 2]) == 1
    assert drift([2, 2, 1, 1]) == 0.5
    assert drift([1, 5, 9]) == 0
