"""Weights are off by half a step at most, and stored in the kind that their precision says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svcli_export.contract import Precision, build_contract
from svcli_export.quantize import (
    BLOCK,
    dequantize_blocks,
    pack,
    quantize_blocks,
    quantize_channels,
    stored_tensors,
    unpack,
)
from svcli_export.weights import TensorInfo
from tests.export.tiny import tiny_model

SIZES = st.floats(1e-6, 1e6)


def drawn(seed: int, rows: int, columns: int, size: float) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size


def infos(precision: Precision) -> dict[str, TensorInfo]:
    model = tiny_model()
    pieces = stored_tensors(model, build_contract(model.config, 64, 1, precision))
    return {name: info for piece in pieces for name, info in piece.infos.items()}


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), columns=st.integers(1, 9), size=SIZES)
def test_int8_is_off_by_half_a_scale_at_most(seed: int, rows: int, columns: int, size: float) -> None:
    matrix = drawn(seed, rows, columns, size)
    stored, scale = quantize_channels(matrix)
    assert stored.dtype == torch.int8
    assert (stored.shape, scale.shape) == ((columns, rows), (rows,))
    assert stored.min() >= -127  # symmetric: -128 would have no counterpart
    assert ((stored * scale - matrix.T).abs() <= scale * 0.5001).all()


def test_a_row_of_zeros_stays_zero() -> None:
    stored, scale = quantize_channels(torch.zeros(2, 3))
    assert torch.isfinite(scale).all()
    assert not (stored * scale).any()
    numbers, scales, zero = quantize_blocks(torch.zeros(2, 3))
    assert torch.isfinite(scales).all()
    assert not dequantize_blocks(pack(numbers), scales, pack(zero)).any()


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(1, 5),
    columns=st.sampled_from([1, 7, 32, 33, 64, 80]),
    size=SIZES,
    offset=st.floats(-3, 3),
)
def test_int4_is_off_by_half_a_step_of_its_block(
    seed: int, pairs: int, columns: int, size: float, offset: float
) -> None:
    matrix = drawn(seed, 2 * pairs, columns, size) + offset * size
    numbers, scale, zero = quantize_blocks(matrix)
    assert int(numbers.max()) <= 15
    assert scale.shape == zero.shape == (-(-columns // BLOCK), 2 * pairs)
    back = dequantize_blocks(pack(numbers), scale, pack(zero)).T
    assert back.shape == matrix.shape
    for first in range(0, columns, BLOCK):
        block, found = matrix[:, first : first + BLOCK], back[:, first : first + BLOCK]
        low, high = block.amin(1).clamp(max=0), block.amax(1).clamp(min=0)
        step = ((high - low) / 15)[:, None]
        # Half a step, and again where both ends of the block fall between two numbers and one of them is cut.
        assert ((found - block).abs() <= step * 1.0001).all()
        inside = (block > (low[:, None] + step)) & (block < (high[:, None] - step))
        assert ((found - block).abs() <= step * 0.5001)[inside].all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), size=SIZES)
def test_what_int4_has_rounded_is_rounded_to_itself(seed: int, size: float) -> None:
    numbers, scale, zero = quantize_blocks(drawn(seed, 4, 64, size))
    again = quantize_blocks(dequantize_blocks(pack(numbers), scale, pack(zero)).T)
    assert torch.equal(again[0], numbers)
    assert torch.equal(again[2], zero)
    torch.testing.assert_close(again[1], scale, rtol=1e-6, atol=0)


def test_two_numbers_are_packed_low_one_first() -> None:
    numbers = torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8)
    assert pack(numbers).tolist() == [[0x21, 0xF3]]
    assert torch.equal(unpack(pack(numbers)), numbers.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_rounded_as_its_fp32_copy(dtype: Any) -> None:
    half = tiny_model().to(dtype)
    for precision in ("fp16", "int8", "int4"):
        contract = build_contract(half.config, 64, 1, precision)
        found = {name: each for piece in stored_tensors(half, contract) for name, each in piece.make().items()}
        whole = tiny_model().to(dtype).float()
        for piece in stored_tensors(whole, contract):
            for name, wanted in piece.make().items():
                np.testing.assert_array_equal(found[name], wanted, err_msg=name)


@pytest.mark.parametrize(("precision", "floats"), [("fp32", {"float32"}), ("fp16", {"float16"})])
def test_float_bundles_have_one_dtype(precision: Precision, floats: set[str]) -> None:
    assert {np.dtype(info.dtype).name for info in infos(precision).values()} == floats


def test_int8_covers_every_matrix_and_the_embedding() -> None:
    stored = infos("int8")
    matrices = {name for name in stored if name.endswith(".T")}
    assert "decoder.embed.weight.T" in matrices
    assert len(matrices) == 2 * 4 + 2 + 2 * 7 + 1  # encoder layers that are read, projector, decoder layers, embedding
    assert {np.dtype(stored[name].dtype).name for name in matrices} == {"int8"}


def test_int4_is_for_the_layers_of_the_decoder() -> None:
    stored = infos("int4")
    kinds = {name: np.dtype(info.dtype).name for name, info in stored.items() if name.endswith(".T")}
    assert kinds.keys() == {name for name in infos("int8") if name.endswith(".T")}
    assert {name for name, kind in kinds.items() if kind == "uint8"} == {
        name for name in kinds if name.startswith("decoder.layers.")
    }
    assert {kind for name, kind in kinds.items() if not name.startswith("decoder.layers.")} == {"int8"}


def test_layers_of_the_encoder_that_nothing_reads_are_left_out() -> None:
    names = infos("fp32").keys()
    assert any(name.startswith("vision.blocks.1.") for name in names)
    assert not any(name.startswith("vision.blocks.2.") for name in names)


def test_nothing_is_made_before_it_is_written() -> None:
    """A model on the meta device has no values to make anything of."""
    model = tiny_model().to("meta")
    pieces = list(stored_tensors(model, build_contract(model.config, 64, 1, "int4")))
    assert sum(len(piece.infos) for piece in pieces) == len(infos("int4"))
    with pytest.raises(TypeError, match="meta"):
        pieces[-1].make()
