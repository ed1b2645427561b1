"""The report says what was measured, gives verdicts by rule, and is all that the README quotes."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import blocks, claims, report, tables, tool_blocks
from benchmarks.report import SCRIPTS, SECTIONS, Need, Script
from tests.bench.reports import beside_a_pruner

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REPORT = (ROOT / "benchmarks" / "REPORT.md").read_text(encoding="utf-8")
MEASURE = re.compile(
    r"\d[\d.,]*(?:\s| to \d[\d.,]*\s)?\s?(?:%|ms|s|seconds|minutes|[KMG]i?B|[GT]FLOPs?|times|points|tokens/s)(?!\w)"
)


def test_the_report_is_what_was_measured() -> None:
    assert report.report() == REPORT


def test_every_block_of_measurements_is_in_the_report() -> None:
    reported = {name for _, names in SECTIONS for name in names}
    assert reported == tables.BLOCKS.keys() - {"families", "model", "vocabulary"}, "those three tell of code"


def quoted(text: str) -> tuple[set[str], list[str]]:
    """Names of the blocks of a document, and the figures with a unit that stand outside of them and of code."""
    names = set(re.findall(r"<!-- begin: (\S+) -->", text))
    prose = re.sub(r"<!-- begin: (\S+) -->.*?<!-- end: \1 -->|```.*?```", "", text, flags=re.DOTALL)
    return names, MEASURE.findall(prose)


def test_the_readme_quotes_nothing_but_the_report() -> None:
    names, figures = quoted(README)
    assert names <= {name for _, names in SECTIONS for name in names}
    assert [figure for figure in figures if figure not in REPORT] == []


def test_a_figure_from_elsewhere_is_found() -> None:
    told = README.replace("## Limits", "It is 3.7 times as fast and takes 12 ms.\n\n## Limits")
    assert {"3.7 times", "12 ms"} <= set(quoted(told)[1]) - set(quoted(README)[1])
    assert "3.7 times" not in REPORT


def test_every_script_of_the_documents_can_be_run_again() -> None:
    told = re.findall(r"^\| `(\w+)` \|", (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {script.name for script in SCRIPTS} == set(told) - {"selection"}
    assert all((ROOT / "benchmarks" / f"{script.name}.py").is_file() for script in SCRIPTS)


def of_seeds(*values: float) -> dict[str, Any]:
    return {"seeds": {str(number): {"accuracy": {"all": value}} for number, value in enumerate(values)}}


def test_the_rule_for_kept_accuracy() -> None:
    dense = of_seeds(0.60, 0.62, 0.64)
    assert claims.not_below(of_seeds(0.60, 0.61, 0.63), dense)
    assert not claims.not_below(of_seeds(0.59, 0.61, 0.62), dense)
    assert claims.above(of_seeds(0.62, 0.63, 0.66), dense)
    assert not claims.above(of_seeds(0.61, 0.62, 0.65), dense)


def test_a_claim_that_does_not_hold_is_printed_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    results = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    monkeypatch.setattr(claims, "result", results.__getitem__)
    latency = next(claim for claim in claims.CLAIMS if claim.says.startswith("Latency"))
    for high, verdict in ((0.5, "holds here"), (0.95, "does not hold here")):
        ratio = {"ratio": high - 0.01, "low": high - 0.02, "high": high}
        results["speed"]["onnxruntime"]["first_token"]["ratio"] = ratio
        assert latency.finding().verdict == verdict
        assert f"**{verdict}**" in claims.claims_table().partition("Latency")[2].partition("\n")[0]


def test_what_was_not_measured_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(blocks, "RESULTS", tmp_path)
    blocks.result.cache_clear()
    try:
        found = claims.claims_table()
    finally:
        blocks.result.cache_clear()
    lines = found.splitlines()[2:]
    assert sum("**not measured**" in line for line in lines) == len(claims.CLAIMS) - 1, "FLOPs are counted by code"
    assert "run `python -m benchmarks.speed`" in found


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "runs.json"
    monkeypatch.setattr(report, "RUNS", path)
    monkeypatch.setattr(Script, "command", lambda self, _options: [sys.executable, "-c", self.arguments[0]])
    return path


def test_a_rerun_notes_what_ran_what_failed_and_what_could_not_run(notes: Path) -> None:
    never = Need("needs a moon", lambda _: False)
    scripts = (
        Script("good", 1, (), ("pass",)),
        Script("bad", 1, (), ("raise SystemExit(3)",)),
        Script("far", 1, (never,), ("raise SystemExit('ran')",)),
        Script("long", 99, (), ("raise SystemExit('ran')",)),
        Script("other", 1, (), ("raise SystemExit('ran')",)),
    )
    options = argparse.Namespace(only=["good", "bad", "far", "long"], within=60.0)
    assert report.rerun(options, scripts) == ["bad"]
    noted = json.loads(notes.read_text())
    assert {name: each["outcome"] for name, each in noted.items()} == {
        "good": "ran",
        "bad": "failed with exit code 3",
        "far": "not run: needs a moon",
        "long": "not run: takes about 99 minutes",
    }
    assert ["seconds" in noted[name] for name in ("good", "bad", "far")] == [True, True, False]
    assert report.rerun(argparse.Namespace(only=["good"], within=60.0), scripts) == []
    assert json.loads(notes.read_text()).keys() == noted.keys(), "what is noted of the others stays"


def test_options_reach_the_scripts(tmp_path: Path) -> None:
    options = argparse.Namespace(assets=tmp_path / "my assets", gguf=None)
    scripts = {script.name: script for script in SCRIPTS}
    ran = scripts["reduction"].command(options)[1:]
    assert ran == ["-m", "benchmarks.reduction", "--assets", str(tmp_path / "my assets"), "--overwrite"]
    assert missing(scripts["reduction"], options) == ["needs the assets of `svcli data fetch`"]
    options.assets.mkdir()
    assert missing(scripts["reduction"], options) == []
    assert "needs --gguf" in missing(scripts["smollm2"], options)


def missing(script: Script, options: argparse.Namespace) -> list[str]:
    return [need.missing for need in script.needs if not need.is_there(options)]


def test_what_a_peer_was_asked_tells_its_rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_blocks, "_report", beside_a_pruner)
    block = tool_blocks.bench_peers()
    for name in (
        "openvino-genai 1",
        "openvino-genai 1, a picture, dense, 266 rows beside 264",
        "openvino-genai 1, a picture, CDPruner, 107 rows beside 106",
    ):
        assert f"| {name} |" in block
    assert "where nothing else is said, 264 rows in prefill" in block
