"""The check at the end of an export looks at one thing at a time, and at less of a large model."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from svcli_export import verify as verify_module
from svcli_export.contract import Precision
from svcli_export.runtime import open_session
from svcli_export.verify import verify, violations
from tests.export.test_graphs import PROMPT, Written, pictures, write
from tests.export.tiny import asked


def checked(written: Written) -> Any:
    return verify(written.model, written.contract, written.folder, asked(written.model, pictures(), PROMPT))


def test_one_session_is_open_at_a_time_and_pytorch_is_done_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write(tmp_path, "skip", "fp32")
    events: list[str] = []
    sessions: list[weakref.ref[Any]] = []
    decode = written.model.decode

    def opened(graph: Path, **options: Any) -> Any:
        assert not any(session() for session in sessions)
        events.append(graph.stem)
        session = open_session(graph, **options)
        sessions.append(weakref.ref(session))
        return session

    def decoded(*arguments: Any) -> Any:
        events.append("torch")
        return decode(*arguments)

    monkeypatch.setattr(verify_module, "open_session", opened)
    monkeypatch.setattr(written.model, "decode", decoded)
    checked(written)
    assert events == ["torch"] * 2 * 15 + ["vision", "prefill", "decode"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_a_large_model_is_asked_less_and_the_outcome_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    written = write(tmp_path, "skip", precision)
    monkeypatch.setattr(verify_module, "LARGE", 1)
    monkeypatch.setattr(verify_module, "HELD", 1)
    found = checked(written)
    assert (found.num_pictures, found.num_tokens) == (1, verify_module.LARGE_TOKENS)
    assert violations(found, precision) == []


@pytest.mark.parametrize("held", [True, False])
def test_a_model_in_half_precision_is_checked_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    written = write(tmp_path, "skip", "fp16")
    whole = checked(written)
    written.model.half()
    if not held:
        monkeypatch.setattr(verify_module, "HELD", 1)
    found = checked(written)
    assert violations(found, "fp16") == []
    # Its weights are those of the graphs to the bit; what is left are the activations.
    assert found.stages[1].cosine >= whole.stages[1].cosine
    assert all(parameter.dtype.itemsize == 2 for parameter in written.model.parameters())


def test_fp16_weights_are_not_folded_to_fp32_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "skip", "fp16")
    options = ort.SessionOptions
    found: dict[bool, tuple[Any, int]] = {}
    for lean in (True, False):
        used = options()
        used.optimized_model_filepath = str(tmp_path / f"optimised-{lean}.onnx")
        monkeypatch.setattr(ort, "SessionOptions", lambda used=used: used)
        session = open_session(tmp_path / "vision.onnx", lean=lean)
        visual = session.run(None, {"pixels": np.ones((1, 3, 28, 28), np.float32)})[0]
        graph = onnx.load(used.optimized_model_filepath).graph
        fp32 = [each for each in graph.initializer if each.data_type == TensorProto.FLOAT and len(each.dims) > 1]
        found[lean] = visual, sum(int(np.prod(each.dims)) for each in fp32)
        assert used.enable_cpu_mem_arena is not lean
    np.testing.assert_allclose(found[True][0], found[False][0], atol=0.02)
    assert found[True][1] == 0
    assert found[False][1] > 10_000
