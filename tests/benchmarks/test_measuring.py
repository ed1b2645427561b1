"""What is made of measured times."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.measuring import ratio, spread, write_results
from benchmarks.processes import run


def test_spread_of_known_values() -> None:
    assert spread(list(range(101))) == {"median": 50.0, "p10": 10.0, "p90": 90.0, "runs": 101}


def test_ratio_of_paired_rounds_is_exact_where_one_is_a_multiple_of_the_other() -> None:
    dense = np.random.default_rng(0).lognormal(size=41)
    assert ratio((dense / 4).tolist(), dense.tolist()) == pytest.approx({"ratio": 0.25, "low": 0.25, "high": 0.25})


def test_ratio_of_noise_is_about_one_and_inside_its_interval() -> None:
    first, second = np.random.default_rng(0).normal(10, 1, (2, 200))
    found = ratio(first.tolist(), second.tolist())
    assert found["low"] < found["ratio"] < found["high"]
    assert 0.9 < found["low"] < 1 < found["high"] < 1.1


def test_results_are_rounded_and_whole_numbers_stay_whole(tmp_path: Path) -> None:
    write_results({"a": 0.123456789, "b": [1234567, {"c": 2.0}]}, tmp_path / "new" / "results.json")
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == {"a": 0.12346, "b": [1234567, {"c": 2.0}]}


def test_peak_memory_is_that_of_the_process_and_not_of_the_one_that_measures() -> None:
    ballast = bytearray(b"x" * 300_000_000)
    small = run([sys.executable, "-c", "print('done')"])
    large = run([sys.executable, "-c", "x = b'x' * 100_000_000"])
    assert small.stdout == "done\n"
    assert small.peak_bytes < 60_000_000 < 100_000_000 < large.peak_bytes < 200_000_000 < len(ballast)


def test_a_process_that_fails_stops_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="out of luck"):
        run([sys.executable, "-c", "raise SystemExit('out of luck')"])
