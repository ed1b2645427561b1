"""Tables of svcli bench, eval and sweep say what their results do, and of nothing that is not there."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench, tool_blocks
from benchmarks.blocks import NotMeasuredError
from svcli_engines.base import MachineError
from tests.bench.reports import report

AROUND = {
    "date": "2026-01-01",
    "machine": {"cpu": "a CPU"},
    "threads": 2,
    "versions": {"onnxruntime": "1.31.1"},
}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    held: dict[str, Any] = {}
    monkeypatch.setattr(tool_blocks, "result", held.__getitem__)
    return held.__setitem__


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 1, "high": value + 1}


def test_stages_stand_beside_what_they_say(results: Callable[[str, Any], None]) -> None:
    told = report({"prefill": 0.5, "first_token": 0.8}).model_dump(mode="json")
    told["versions"]["onnxruntime"] = "1.31.1"
    told["remarks"] = ["stopped after 20 rounds"]
    results("bench", told)
    results("speed", {"onnxruntime": {"vision": {"dense": {"median": 1.1}}}})
    assert "inside of one table" not in tool_blocks.bench()
    results("speed", {"onnxruntime": {"vision": {"dense": {"median": 0.5}}}})
    found = tool_blocks.bench()
    assert "Vision takes 2 times as long as in `benchmarks.speed`" in found
    assert "| prefill | 1 s | 1 s | 501 ms | 502 ms | 0.50 | 0.50 to 0.50 |" in found
    assert "| 4 side by side: decode per token |" in found
    assert "| 300 rows: prefill |" in found
    assert "- Skipping shortened prefill to 50.0%" in found
    assert "- Note: stopped after 20 rounds." in found
    work = tool_blocks.bench_work()
    assert "| prefill, dense | 1 | 19.1 MiB | 10 ms | 1.0 % |" in work
    assert "100 GFLOP/s and 10.0 GB/s, measured" in work


def test_without_a_peer_nothing_is_told_of_peers(results: Callable[[str, Any], None]) -> None:
    results("bench", report().model_dump(mode="json"))
    with pytest.raises(NotMeasuredError, match="no peer"):
        tool_blocks.bench_peers()


def test_peers_that_are_missing_are_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def check(names: list[str], _engine: object) -> None:
        if names != ["here"]:
            raise MachineError(f"--peer {names[0]}: not installed here")

    monkeypatch.setattr(bench, "PEERS", {"here": None, "elsewhere": None})
    monkeypatch.setattr(bench, "check_peers", check)
    options = argparse.Namespace(bundle=Path("a bundle"), rounds=7, output=tmp_path / "bench.json")
    command = bench.command(options)
    assert [word for word in command if word.startswith("--peer")] == ["--peer=here"]
    assert command[command.index("--rounds") + 1] == "7"
    assert command[command.index("--json") + 1] == str(tmp_path / "bench.json")
    assert "--peer elsewhere: not installed here" in capsys.readouterr().err


def asker(figure: float, rows: float, above: float | None) -> dict[str, Any]:
    over = None if above is None else interval(above)
    counted = {"visual_tokens": rows, "cached_rows": rows + 10, "flops": 12e9}
    return {"items": 2400, "interval": interval(figure), "own above it": over, **counted}


def test_baselines_have_their_rows_and_the_difference(results: Callable[[str, Any], None]) -> None:
    askers = {"skipped": asker(80, 162, None), "dense": asker(84, 256, -4), "random:98": asker(70, 98, 10)}
    results("reduction", AROUND | {"eval": {"bundled": {"askers": askers}, "easy-vqa": {"askers": askers}}})
    found = tool_blocks.baselines().splitlines()
    assert found[2] == (
        "| skipping, as trained | 80.0 % (79.0 to 81.0) | 80.0 % (79.0 to 81.0) |  | 162 | 172 | 12.0 |"
    )
    assert "| dense, the same weights | 84.0 % (83.0 to 85.0) |" in found[3]
    assert "| -4.0 (-5.0 to -3.0) | 256 | 266 |" in found[3]
    assert found[4].startswith("| 98 rows drawn at random |")
    assert "2,400 questions" in "\n".join(found)


def test_a_sweep_tells_front_choice_and_what_is_trained(results: Callable[[str, Any], None]) -> None:
    common = {"visual_tokens": 115.0, "cached_rows": 56.0, "flops": 11e9, "first_token": 0.03}
    settings = [
        {"setting": "44/69", "interval": interval(78), "over_best": interval(-2), "is_trained": False, **common},
        {"setting": "96/64", "interval": interval(80), "over_best": None, "is_trained": True, **common},
        {"setting": "off", "interval": interval(76), "over_best": interval(-4), "is_trained": False, **common},
    ]
    choice = {"setting": "96/64", "reason": "it has the best accuracy."}
    swept = {"settings": settings, "front": ["44/69", "96/64"], "choice": choice, "remarks": ["Few items."]}
    results("reduction", AROUND | {"sweep": swept})
    found = tool_blocks.sweep()
    assert "| 44/69 | 78.0 % (77.0 to 79.0) | -2.0 (-3.0 to -1.0) | 115 | 56 | 11.0 | 30 ms | yes |" in found
    assert "| 96/64, trained | 80.0 % (79.0 to 81.0) |  | 115 |" in found
    assert "| dense | 76.0 % (75.0 to 77.0) | -4.0 (-5.0 to -3.0) | 115 | 56 | 11.0 | 30 ms |  |" in found
    assert "chooses **96/64**: it has the best accuracy." in found
    assert "Few items." in found
