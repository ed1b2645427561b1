"""The check of PyTorch's engine on a GPU, on the CPU: everything but the GPU, its graphs and compiled code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu_engine
from benchmarks.gpu_check import NO_DEVICE
from benchmarks.gpu_engine import run, subjects
from svcli_engines.torch_engine import TorchEngine, TorchPool
from svcli_export.bundle import export_bundle
from tests.export.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu_engine")
    export_bundle(tiny_checkpoint(folder / "checkpoint"), folder / "bundle", precision="fp32", max_context=96)
    return folder / "bundle"


@pytest.fixture(autouse=True)
def as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_engine, "MODES", (("fp32", False), ("bf16", False)))
    monkeypatch.setattr(gpu_engine, "_TIMED", ("fp32", False))


def test_both_models_are_checked_and_timed(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(bundle, "cpu", 2)
    assert [(check["model"], check["precision"]) for check in found["checks"]] == [
        ("dense", "fp32"),
        ("dense", "bf16"),
        ("skipped", "fp32"),
        ("skipped", "bf16"),
    ]
    assert [check["agreement"] for check in found["checks"] if check["precision"] == "fp32"] == [1.0, 1.0]
    assert set(found["stages"]) == {"vision", "prefill", "decode_token"}
    assert all(stage["dense"]["runs"] == stage["skipped"]["runs"] == 2 for stage in found["stages"].values())
    told = capsys.readouterr().out
    assert "skipped fp32, as written, decoding: eager: 100.0%" in told
    assert "dense fp32, slot 3 of a pool, decoding: eager: 100.0%" in told


def test_the_models_differ_in_their_rows_alone(bundle: Path) -> None:
    found = subjects(bundle, sorted(Path("examples").glob("*.png"))[:1])
    dense, skipped = (found[name].samples[0].prompt for name in ("dense", "skipped"))
    assert dense.ids == skipped.ids
    assert dense.layout.num_kept > skipped.layout.num_kept
    np.testing.assert_array_equal(found["dense"].samples[0].pixels, found["skipped"].samples[0].pixels)


def test_an_engine_that_is_off_ends_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = TorchEngine.extend

    def off(engine: TorchEngine, ids: Any) -> Any:
        logits = fill(engine, ids)
        return -logits if engine.precision == "bf16" else logits

    monkeypatch.setattr(TorchEngine, "extend", off)
    with pytest.raises(SystemExit, match=r"dense bf16, as written, decoding: eager: decode 1: error 2 above"):
        run(bundle, "cpu", 1)


def test_a_pool_that_is_off_ends_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = TorchPool._decode
    monkeypatch.setattr(TorchPool, "_decode", lambda pool, run, rows: -decode(pool, run, rows))
    with pytest.raises(SystemExit, match=r"dense fp32, slot 1 of a pool, decoding: eager: decode 1: error"):
        run(bundle, "cpu", 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_engine"])
    with pytest.raises(SystemExit) as ended:
        gpu_engine.main()
    assert ended.value.code == NO_DEVICE
    assert "no CUDA device" in capsys.readouterr().err
