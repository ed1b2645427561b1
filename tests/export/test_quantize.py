"""int8 weights are off by half a step at most."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svcli_export.contract import build_contract
from svcli_export.quantize import quantize_channels, stored_tensors
from tests.export.tiny import tiny_model


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), columns=st.integers(1, 9), size=st.floats(1e-6, 1e6))
def test_error_is_at_most_half_a_scale(seed: int, rows: int, columns: int, size: float) -> None:
    matrix = (np.random.default_rng(seed).standard_normal((rows, columns)) * size).astype(np.float32)
    stored, scale = quantize_channels(matrix)
    assert stored.dtype == np.int8
    assert scale.shape == (columns,)
    assert stored.min() >= -127  # symmetric: -128 would have no counterpart
    assert np.all(np.abs(stored * scale - matrix) <= scale * 0.5001)


def test_a_column_of_zeros_stays_zero() -> None:
    stored, scale = quantize_channels(np.zeros((3, 2), np.float32))
    assert np.isfinite(scale).all()
    assert not (stored * scale).any()


@pytest.mark.parametrize(("precision", "floats"), [("fp32", {"float32"}), ("fp16", {"float16"})])
def test_float_bundles_have_one_dtype(precision: str, floats: set[str]) -> None:
    model = tiny_model()
    tensors = stored_tensors(model, build_contract(model.config, 64, 1, precision))  # type: ignore[arg-type]
    assert {tensor.dtype.name for tensor in tensors.values()} == floats


def test_int8_covers_every_matrix_and_the_embedding() -> None:
    model = tiny_model()
    tensors = stored_tensors(model, build_contract(model.config, 64, 1, "int8"))
    matrices = {name for name in tensors if name.endswith(".T")}
    assert "decoder.embed.weight.T" in matrices
    assert len(matrices) == 2 * 4 + 2 + 2 * 7 + 1  # encoder layers that are read, projector, decoder layers, embedding
    assert {tensors[name].dtype.name for name in matrices} == {"int8"}


def test_layers_of_the_encoder_that_nothing_reads_are_left_out() -> None:
    model = tiny_model()
    names = stored_tensors(model, build_contract(model.config, 64, 1, "fp32")).keys()
    assert any(name.startswith("vision.blocks.1.") for name in names)
    assert not any(name.startswith("vision.blocks.2.") for name in names)
