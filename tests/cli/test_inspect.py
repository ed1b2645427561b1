"""`svcli inspect` shows what the layout and the contract say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from svcli import ui
from svcli.app import app


def test_json_has_rows_and_bytes_full_against_reduced(bundle: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(bundle), "--json"])
    assert (shown.exit_code, shown.stderr) == (0, "")
    facts = json.loads(shown.stdout)
    # 16 patches; 4 retained, 4 skipped and 2 summaries of them reach the decoder.
    assert facts["rows_per_image"] == {"tokens": 16, "attention": 10, "feed_forward": 6, "kv_cache": 6}
    row = 2 * 2 * 1 * 16 * 4  # K and V, 2 layers, 1 head of 16, 4 bytes
    assert facts["kv_bytes_per_row"] == row
    assert facts["kv_full"]["rows"] - facts["kv_reduced"]["rows"] == 2 * (16 - 6)
    assert facts["kv_reduced"]["bytes_total"] == facts["kv_reduced"]["rows"] * row
    assert facts["file_problems"] == {}


def test_tables_name_graphs_shapes_rows_and_files(bundle: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(bundle)])
    assert (shown.exit_code, shown.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert "16 10 6 6" in lines
    assert "one image 16 6 4 KiB 1.5 KiB" in lines
    assert "prefill in past_key_values.N.key float32 [1, 1, 76, 16]" in lines
    assert any(line.startswith("weights.safetensors ") and line.endswith(" ok") for line in lines)


def test_variants_are_shown_with_what_their_cache_takes(bundle: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(bundle)])
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert any(re.fullmatch(r"dense off 96 24 KiB \d+ 100.0% of 48", line) for line in lines), shown.stdout
    assert any(line.startswith("dense.decode.onnx ") and line.endswith(" ok") for line in lines)
    assert "run dense it shows what skipping saves in time and memory" in " ".join(lines)
    facts = json.loads(CliRunner().invoke(app, ["inspect", str(bundle), "--json"]).stdout)
    assert list(facts["variants"]) == list(facts["manifest"]["variants"]) == ["dense"]
    assert facts["variants"]["dense"]["kv_reduced"] == facts["kv_full"]
    assert facts["variants"]["dense"]["rows_per_image"]["kv_cache"] == 16
    altered = shutil.copytree(bundle, tmp_path / "altered")
    (altered / "dense.vision.onnx").unlink()
    refused = CliRunner().invoke(app, ["inspect", str(altered)])
    assert refused.exit_code == 1
    assert "dense.vision.onnx is missing" in refused.stderr


def test_an_altered_file_is_shown_and_named_and_is_a_failure(bundle: Path, tmp_path: Path) -> None:
    altered = shutil.copytree(bundle, tmp_path / "altered")
    with (altered / "decode.onnx").open("ab") as file:
        file.write(b"x")
    shown = CliRunner().invoke(app, ["inspect", str(altered)])
    assert shown.exit_code == 1
    assert "decode.onnx" in shown.stderr
    assert len(shown.stderr.splitlines()) == 1
    assert "weights.safetensors" in shown.stdout


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1 << 20, "1 MiB"), (5 << 30, "5 GiB")]
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert ui.size(num_bytes) == text
