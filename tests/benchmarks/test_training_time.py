"""How long a run took is read from its log, of whichever kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.measuring import RESULTS
from benchmarks.training_time import read_log


def test_time_is_added_up_over_steps_and_what_is_between_them(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    seconds = {"data": 1.0, "forward": 2.0, "backward": 4.0, "optimiser": 8.0, "other": 45.0}
    rows = [
        {"encode_seconds": 90.0},
        {"event": "step", "step": 1, "seconds": seconds},
        {"event": "validation", "step": 1, "scores": {"all": 0.5}, "best": False},
        {"event": "step", "step": 2, "seconds": seconds},
        {"event": "done", "step": 2, "seconds": seconds},
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_log(log) == {"steps": 2, "minutes": 2.0, "encode_minutes": 1.5}


def test_the_first_logs_are_still_read() -> None:
    """Their seconds are those since the last start."""
    log = RESULTS / "skipvision-tiny.log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    found = read_log(log)
    assert found["steps"] == max(row.get("step", 0) for row in rows)
    assert found["minutes"] * 60 >= max(row.get("seconds", 0) for row in rows) > 0


def test_stretches_of_a_first_log_are_added_up(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    rows = [{"step": step, "loss": 1.0, "seconds": seconds} for step, seconds in ((1, 30), (2, 60), (3, 20), (4, 60))]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_log(log)["minutes"] == pytest.approx(2.0)
