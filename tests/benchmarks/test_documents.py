"""The documents say what was measured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tables
from skipvision.presets import PRESETS

ROOT = Path(__file__).parents[2]
UNMEASURED = {"kernels", "gpu", "gpu_engine"}
"""Blocks that may say so. By hand, so that a result which is lost, or measured at last, is noticed."""
SCRIPTS = (
    "accuracy",
    "bench",
    "export_size",
    "gpu_check",
    "gpu_engine",
    "gpu_speed",
    "loading",
    "main_plot",
    "main_table",
    "profile",
    "reduction",
    "report",
    "row_order",
    "server_faults",
    "serving",
    "smollm2",
    "speed",
    "tables",
    "training_ratio",
    "training_time",
    "twins",
)


def test_every_figure_in_the_documents_is_the_one_that_was_measured() -> None:
    assert tables.stale() == []


def test_only_what_is_listed_is_not_measured() -> None:
    pattern = re.compile(r"<!-- begin: (\S+) -->\n\n" + re.escape(tables.NOT_MEASURED))
    found = {name for document in tables.DOCUMENTS for name in pattern.findall(document.read_text(encoding="utf-8"))}
    assert found == UNMEASURED


@pytest.mark.parametrize(
    ("document", "blocks"),
    [
        ("README.md", {"accuracy", "twins", "speed", "start"}),
        ("docs/bench.md", {"bench", "bench_work", "bench_peers"}),
        ("docs/eval.md", {"baselines", "sweep"}),
        ("docs/models.md", {"families", "loading", "export_size"}),
        ("docs/profile.md", {"profile"}),
        ("docs/serve.md", {"serving", "soak", "faults"}),
        ("docs/training.md", {"training_ratio", "training_work", "main_table"}),
        ("benchmarks/README.md", {"engines", "smollm2", "smollm2_texts"}),
        (
            "models/skipvision-tiny/README.md",
            {"model", "vocabulary", "accuracy", "twins", "selection", "speed", "training"},
        ),
    ],
)
def test_no_document_lost_a_block(document: str, blocks: set[str]) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert all(f"<!-- begin: {name} -->\n" in text and f"<!-- end: {name} -->" in text for name in blocks)


def test_a_figure_that_was_changed_by_hand_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "README.md"
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "DOCUMENTS", (document,))
    text, missing = tables.filled("before\n<!-- begin: model -->\n<!-- end: model -->\nafter\n")
    document.write_text(text, encoding="utf-8")
    assert missing == []
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert tables.stale() == []
    document.write_text(text.replace("256 patches", "257 patches"), encoding="utf-8")
    assert tables.stale() == ["README.md"]


def test_an_unknown_block_is_an_error() -> None:
    with pytest.raises(SystemExit, match="no block 'speeed'"):
        tables.filled("<!-- begin: speeed -->\n<!-- end: speeed -->\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_how_it_is_used(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_every_preset_is_named_where_models_are() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in PRESETS)
