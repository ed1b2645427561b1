"""Launch dimensions and parameters: what the kernels' source and the compiled code say is what launch.py says."""

from __future__ import annotations

import ctypes
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svcli_engines.plugins.compile import SOURCE
from svcli_engines.plugins.launch import (
    ELEMENT_BYTES,
    ELEMENTS,
    KERNELS,
    MAX_POOL_WIDTH,
    OPS,
    Element,
    LaunchError,
    Op,
    PackedParameters,
    defines,
    num_parts,
    summary_merge,
    summary_partial,
    token_gather,
)

SIZES = st.integers(1, 5000)


@pytest.mark.parametrize("op", OPS)
def test_the_source_names_its_parameters_in_this_order(op: Op) -> None:
    kernel = KERNELS[op]
    source = SOURCE.read_text(encoding="utf-8")
    (declared,) = re.findall(rf"SVCLI_ENTRY\({kernel.name}\)\(([^)]*)\)", source)
    # A name in a comment is of a parameter that is not read.
    names = tuple(re.sub(r"[/*]+", " ", part).split()[-1] for part in declared.split(","))
    assert names == kernel.parameters


@given(batch=SIZES, heads=st.integers(1, 64), rows=SIZES, taken=SIZES, width=SIZES, element=st.sampled_from(ELEMENTS))
def test_the_threads_of_a_gather_cover_whole_rows_once(
    batch: int, heads: int, rows: int, taken: int, width: int, element: Element
) -> None:
    launch = token_gather((batch, heads, rows, width), (batch, taken), element)
    constants = defines("TokenGather", element)
    per_block = 16 * launch.block * constants["SVCLI_GATHER_UNROLL"]
    least = batch * heads * taken * width * ELEMENT_BYTES[element]
    rounded = batch * heads * taken * (16 + width * ELEMENT_BYTES[element])
    assert launch.grid * per_block >= least
    assert (launch.grid - 1) * per_block < rounded
    assert launch.extras == (batch * heads, heads, rows, taken, width)
    assert launch.block == constants["SVCLI_GATHER_THREADS"]


def test_rows_without_heads_are_one_head() -> None:
    assert token_gather((2, 9, 4), (2, 3), "fp32").extras == (2, 1, 9, 3, 4)


@pytest.mark.parametrize("data", [(2, 0, 8), (0, 9, 8), (2, 9, 0)])
@pytest.mark.parametrize("taken", [0, 3])
def test_no_grid_is_empty(data: tuple[int, ...], taken: int) -> None:
    assert token_gather(data, (data[0], taken), "fp16").grid >= 1


@pytest.mark.parametrize("rows", [0, 9])
def test_no_grid_of_a_pool_is_empty(rows: int) -> None:
    assert summary_partial((0, rows, 8), "fp16", 1e-5).grid == num_parts(rows)
    assert summary_partial((1, 0, 8), "fp16", 1e-5).grid == 1
    assert summary_merge((0, num_parts(rows), 10), (8,), "fp16").grid == 1


@pytest.mark.parametrize(("data", "index"), [((3, 4), (3, 1)), ((1, 2, 3, 4, 5), (1, 1)), ((1, 2, 3), (2,))])
def test_other_ranks_are_refused(data: tuple[int, ...], index: tuple[int, ...]) -> None:
    with pytest.raises(LaunchError, match=rf"not {len(data)} and {len(index)} axes"):
        token_gather(data, index, "fp32")
    with pytest.raises(LaunchError, match="not 2 axes"):
        summary_partial((3, 4), "fp32", 1e-5)
    with pytest.raises(LaunchError, match="not 2 and 1 axes"):
        summary_merge((3, 4), (2,), "fp32")
    with pytest.raises(LaunchError, match="not 3 and 2 axes"):
        summary_merge((3, 4, 4), (1, 2), "fp32")


@pytest.mark.parametrize("width", [0, MAX_POOL_WIDTH + 1])
def test_rows_that_no_block_holds_are_refused(width: int) -> None:
    assert summary_partial((1, 1, MAX_POOL_WIDTH), "fp32", 1e-5).grid == 1
    refusal = f"rows of 1 to 8192 elements, not {width}"
    with pytest.raises(LaunchError, match=refusal):
        summary_partial((1, 1, width), "fp32", 1e-5)
    with pytest.raises(LaunchError, match=refusal):
        summary_merge((1, 1, width + 2), (width,), "fp32")


@given(epsilon=st.floats(0, 1e3, width=32), images=SIZES, rows=SIZES)
def test_epsilon_travels_as_its_bits(epsilon: float, images: int, rows: int) -> None:
    launch = summary_partial((images, rows, 4), "bf16", epsilon)
    assert launch.extras[:4] == (images, rows, num_parts(rows), 4)
    assert struct.unpack("f", struct.pack("i", launch.extras[4])) == (epsilon,)


@given(images=SIZES, rows=SIZES, width=st.integers(1, MAX_POOL_WIDTH), element=st.sampled_from(ELEMENTS))
def test_parts_and_columns_are_covered_once(images: int, rows: int, width: int, element: Element) -> None:
    constants = defines("SummaryPartial", element)
    rows_of_part, lanes = constants["SVCLI_PARTIAL_ROWS"], 32
    partial = summary_partial((images, rows, width), element, 1e-5)
    parts = num_parts(rows)
    assert (parts - 1) * rows_of_part < rows <= parts * rows_of_part
    assert (partial.grid, partial.block) == (images * parts, constants["SVCLI_PARTIAL_THREADS"])
    # A row has a warp of its own, so that nobody waits for others while rows are scored.
    assert partial.block == lanes * rows_of_part
    merge = summary_merge((images, parts, width + 2), (width,), element)
    columns = merge.grid // images
    assert merge.grid == images * columns
    assert (columns - 1) * lanes < width <= columns * lanes
    assert merge.block == defines("SummaryMerge", element)["SVCLI_MERGE_THREADS"]
    assert merge.extras == (images, parts, width)


def test_parameters_are_packed_as_the_driver_reads_them() -> None:
    launch = token_gather((2, 9, 4), (2, 3), "fp32")
    packed = PackedParameters(launch, [2**40, 2**41], 2**42)
    addresses = (ctypes.c_void_p * 8).from_address(packed.address)
    read = [
        (ctypes.c_int32 if 2 <= place < 7 else ctypes.c_uint64).from_address(address or 0).value
        for place, address in enumerate(addresses)
    ]
    assert read == [2**40, 2**41, *launch.extras, 2**42]
