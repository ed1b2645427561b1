"""Sampling draws from the distribution that its settings describe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svcli_engines.sampling import Sampler, Sampling, SamplingError, distribution

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
logits_vectors = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20).map(lambda v: np.array(v, np.float32))


def test_temperature_zero_is_the_likeliest() -> None:
    assert Sampler(Sampling()).pick(LOGITS) == 1


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=1, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1, top_p=0.7), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1, top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(temperature=1, top_k=1), [0, 1, 0, 0]),
        (Sampling(temperature=1, top_p=1e-9), [0, 1, 0, 0]),
        # After top_k the rest is renormalised: 3 of 7 is less than half, so the second stays out.
        (Sampling(temperature=1, top_k=2, top_p=0.5), [0, 1, 0, 0]),
        (Sampling(temperature=0.5), np.array([1, 16, 4, 9]) / 30),
    ],
)
def test_distribution(sampling: Sampling, expected: Any) -> None:
    np.testing.assert_allclose(distribution(LOGITS, sampling), expected, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(logits_vectors, st.floats(0.01, 10), st.integers(0, 25), st.floats(0.001, 1))
def test_distribution_is_one_and_keeps_the_likeliest(logits: Any, temperature: float, top_k: int, top_p: float) -> None:
    probabilities = distribution(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities[logits.argmax()] == probabilities.max() > 0
    if top_k:
        assert np.count_nonzero(probabilities) <= top_k


def test_a_seed_repeats_the_draw_and_frequencies_fit() -> None:
    draws = [[Sampler(Sampling(temperature=1, seed=seed)).pick(LOGITS) for seed in range(2000)] for _ in range(2)]
    assert draws[0] == draws[1]
    shares = np.bincount(draws[0], minlength=4) / 2000
    np.testing.assert_allclose(shares, [0.1, 0.4, 0.2, 0.3], atol=0.05)  # over 4 standard deviations


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_name_themselves(setting: dict[str, Any]) -> None:
    with pytest.raises(SamplingError, match=next(iter(setting))):
        Sampling(**setting)
