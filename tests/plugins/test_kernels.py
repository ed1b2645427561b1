"""The kernels' own code, run on the CPU, against PyTorch: any shape, every element written, nothing read outside."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.kernel_cases import DTYPES, EPSILON, finite_patterns, gathered, pooled
from svcli_engines.plugins.launch import (
    ELEMENTS,
    PARTIAL_ROWS,
    STATE_EXTRAS,
    Element,
    num_parts,
    summary_merge,
    summary_partial,
    token_gather,
)
from svcli_export import ops
from tests.plugins.cpu_device import CpuDevice, Side, guarded

ELEMENT = st.sampled_from(ELEMENTS)
SIDE = st.sampled_from(get_args(Side))
SEED = st.integers(0, 2**32 - 1)
WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([64, 72, 127, 128, 1024, 1025]))
"""Where accesses are whole and where they are not; of one lane, of all, and just beyond a short row."""


def placed(values: Tensor, side: Side, shift: int = 0) -> Tensor:
    """`values` in memory of their own between pages that cannot be accessed."""
    memory = guarded(values.shape, values.dtype, side, shift)
    memory.copy_(values)
    return memory


def run_gather(
    cpu: CpuDevice, data: Tensor, index: Tensor, element: Element, side: Side = "end", shift: int = 0, seed: int = 0
) -> Tensor:
    shape = (*data.shape[:-2], index.shape[1], data.shape[-1])
    rows = guarded(shape, data.dtype, side, shift)
    inputs = [placed(data, side, shift), placed(index, side)]
    cpu.launch(token_gather(data.shape, index.shape, element), element, inputs, rows, seed=seed)
    return rows


def run_partial(
    cpu: CpuDevice,
    inputs: list[Tensor],
    element: Element,
    *,
    epsilon: float = EPSILON,
    side: Side = "end",
    shifts: tuple[int, int, int, int] = (0, 0, 0, 0),
    seed: int = 0,
) -> Tensor:
    """`shifts` in elements: of tokens, norm_weight, score_weight and the result."""
    batch, rows, width = inputs[0].shape
    partial = guarded((batch, num_parts(rows), width + STATE_EXTRAS), torch.float32, side, shifts[3])
    shift_of = (shifts[0], shifts[1], 0, shifts[2], 0)
    memory = [placed(each, side, shift) for each, shift in zip(inputs, shift_of, strict=True)]
    launch = summary_partial(inputs[0].shape, element, epsilon)
    cpu.launch(launch, element, memory, partial, seed=seed)
    return partial


def run_merge(
    cpu: CpuDevice,
    partial: Tensor,
    norm_weight: Tensor,
    element: Element,
    side: Side = "end",
    shift: int = 0,
    seed: int = 0,
) -> Tensor:
    summary = guarded((partial.shape[0], 1, norm_weight.shape[0]), norm_weight.dtype, side, shift)
    memory = [placed(partial, side, shift), placed(norm_weight, side)]
    cpu.launch(summary_merge(partial.shape, norm_weight.shape, element), element, memory, summary, seed=seed)
    return summary


def run_pool(
    cpu: CpuDevice,
    inputs: list[Tensor],
    element: Element,
    *,
    epsilon: float = EPSILON,
    side: Side = "end",
    shift: int = 0,
    seed: int = 0,
) -> Tensor:
    shifts = (shift, shift, shift, shift)
    partial = run_partial(cpu, inputs, element, epsilon=epsilon, side=side, shifts=shifts, seed=seed)
    return run_merge(cpu, partial, inputs[1], element, side, shift, seed)


def pool_inputs(batch: int, rows: int, width: int, element: Element, seed: int, scale: float = 1.0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, rows, width, generator=random) + torch.randn(batch, rows, 1, generator=random)
    vectors = [torch.randn(*shape, generator=random) for shape in ((width,), (width,), (1, width), (1,))]
    vectors[2] *= scale * width**-0.5
    return [each.to(DTYPES[element]) for each in (tokens, *vectors)]


@settings(max_examples=60, deadline=None)
@given(
    element=ELEMENT,
    batch=st.integers(1, 3),
    heads=st.integers(0, 3),
    rows=st.integers(0, 7),
    taken=st.integers(0, 9),
    width=WIDTHS,
    side=SIDE,
    shift=st.integers(0, 9),
    seed=SEED,
)
def test_token_gather_is_the_eager_op_bit_for_bit(
    cpu: CpuDevice,
    element: Element,
    batch: int,
    heads: int,
    rows: int,
    taken: int,
    width: int,
    side: Side,
    shift: int,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    shape = (batch, heads, rows, width) if heads else (batch, rows, width)
    data = torch.randn(shape, generator=random).to(DTYPES[element])
    index = torch.randint(-rows - 2, rows + 2, (batch, taken), generator=random)
    found = run_gather(cpu, data, index, element, side, shift, seed)
    assert torch.equal(found, gathered(data, index))


@pytest.mark.parametrize("index", [2**31, 2**32, 2**63 - 1, -(2**63), -(2**32) + 1])
def test_an_index_far_outside_gives_zeros(cpu: CpuDevice, index: int) -> None:
    data = torch.ones(1, 3, 8)
    found = run_gather(cpu, data, torch.tensor([[1, index]]), "fp32")
    assert torch.equal(found, torch.tensor([[[1.0] * 8, [0.0] * 8]]))


def test_negative_indices_count_from_the_end_as_in_the_onnx_function(cpu: CpuDevice) -> None:
    data = torch.arange(12.0).view(1, 3, 4)
    found = run_gather(cpu, data, torch.tensor([[-1, -3, 0]]), "fp32")
    assert torch.equal(found, data[:, [2, 0, 0]])


def test_token_gather_of_more_chunks_than_blocks(cpu: CpuDevice) -> None:
    """Rows that are copied element by element need more units than the grid was made for: blocks go round."""
    data = torch.randn(2, 50, 513).half()
    index = torch.randint(0, 50, (2, 90))
    assert torch.equal(run_gather(cpu, data, index, "fp16"), gathered(data, index))


@settings(max_examples=60, deadline=None)
@given(
    element=ELEMENT,
    batch=st.integers(1, 2),
    rows=st.integers(0, 90),
    width=WIDTHS,
    epsilon=st.sampled_from([1e-12, 1e-5, 1.0]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    side=SIDE,
    shift=st.sampled_from([0, 1, 8]),
    seed=SEED,
)
def test_summary_pool_is_the_eager_op_within_fp32_rounding(
    cpu: CpuDevice,
    element: Element,
    batch: int,
    rows: int,
    width: int,
    epsilon: float,
    scale: float,
    side: Side,
    shift: int,
    seed: int,
) -> None:
    inputs = pool_inputs(batch, rows, width, element, seed, scale)
    found = run_pool(cpu, inputs, element, epsilon=epsilon, side=side, shift=shift, seed=seed)
    expected, tolerance = pooled(inputs, element, epsilon)
    assert ((found.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize(
    ("element", "width", "rows"),
    [
        ("fp32", 4096, 21),
        ("fp16", 4095, 9),
        ("bf16", 4104, 9),
        ("bf16", 8192, 15),
        ("fp32", 8192, 11),
        ("fp32", 8191, 3),
        ("bf16", 1024, 150),
        ("fp16", 1032, 33),
        ("bf16", 64, 700),
    ],
)
def test_summary_pool_for_every_team(cpu: CpuDevice, element: Element, width: int, rows: int) -> None:
    inputs = pool_inputs(1, rows, width, element, seed=width)
    expected, tolerance = pooled(inputs, element)
    assert ((run_pool(cpu, inputs, element).double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("rows", [0, 1, 8, 9, 19])
def test_a_part_is_the_softmax_of_its_own_rows(cpu: CpuDevice, element: Element, rows: int) -> None:
    inputs = pool_inputs(2, rows, 40, element, seed=rows)
    exact = [each.double() for each in inputs]
    normed = torch.nn.functional.layer_norm(exact[0], (40,), exact[1], None, EPSILON)
    scores = normed @ exact[3][0]
    found = run_partial(cpu, inputs, element).double()
    for part in range(num_parts(rows)):
        its = slice(part * PARTIAL_ROWS, (part + 1) * PARTIAL_ROWS)
        if rows == 0:
            assert (found[:, part, -STATE_EXTRAS:] == torch.tensor([float("-inf"), 0.0])).all()
            assert (found[:, part, :-STATE_EXTRAS] == 0).all()
            continue
        greatest = scores[:, its].amax(1)
        weights = (scores[:, its] - greatest[:, None]).exp()
        sums = (weights[..., None] * exact[0][:, its]).sum(1)
        expected = torch.cat([sums, greatest[:, None], weights.sum(1)[:, None]], 1)
        torch.testing.assert_close(found[:, part], expected, rtol=0, atol=1e-4)


def test_a_merge_rounds_once_and_reads_nothing_of_the_weight(cpu: CpuDevice) -> None:
    """States by hand: two parts of equal weight, one that is empty, and one so far below that it weighs nothing."""
    states = [[1.0, 3.0, 0.0, 1.0], [2.0, 5.0, 0.0, 3.0], [0.0, 0.0, float("-inf"), 0.0], [9.0, 9.0, -200.0, 1.0]]
    weight = torch.full((2,), float("nan"), dtype=torch.bfloat16)
    found = run_merge(cpu, torch.tensor([states]), weight, "bf16")
    assert torch.equal(found, torch.tensor([[[0.75, 2.0]]], dtype=torch.bfloat16))


@pytest.mark.parametrize(("element", "tolerance"), [("fp32", 1e-5), ("fp16", 3e-3), ("bf16", 3e-2)])
def test_summary_pool_is_near_the_eager_op_in_its_own_precision(
    cpu: CpuDevice, element: Element, tolerance: float
) -> None:
    """The eager op rounds after every step; the tolerance in fp16 is that of the ONNX function's test."""
    inputs = pool_inputs(2, 9, 16, element, seed=0)
    torch.testing.assert_close(
        run_pool(cpu, inputs, element), ops.summary_pool(*inputs, epsilon=EPSILON), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("order", ["up", "down"])
def test_scores_that_no_exponential_holds(cpu: CpuDevice, order: str) -> None:
    """Scores of -4000 to 4000, each greater (or smaller) than all before it, within a part and across parts."""
    rows, width = 70, 16
    pattern = torch.tensor([1.0, -1.0]).repeat(width // 2)
    strength = torch.linspace(-1, 1, rows) if order == "up" else torch.linspace(1, -1, rows)
    # Row n is its strength times the pattern, plus a part that LayerNorm sees as the rest of the deviation.
    other = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(width // 4)
    tokens = strength[:, None] * pattern + (1 - strength[:, None] ** 2).sqrt() * other
    weights = [torch.ones(width), torch.zeros(width), 250.0 * pattern[None], torch.zeros(1)]
    inputs = [tokens[None], *weights]
    found = run_pool(cpu, inputs, "fp32")
    best = tokens[-1 if order == "up" else 0]
    torch.testing.assert_close(found[0, 0], best, rtol=0, atol=1e-3)


def test_tokens_near_the_limits_of_fp16(cpu: CpuDevice) -> None:
    inputs = pool_inputs(1, 9, 32, "fp32", seed=1)
    inputs[0] *= 60000 / inputs[0].abs().max()
    inputs = [each.half() for each in inputs]
    expected, tolerance = pooled(inputs, "fp16")
    assert ((run_pool(cpu, inputs, "fp16").double() - expected).abs() <= tolerance).all()


def test_rows_far_from_zero_keep_their_variance(cpu: CpuDevice) -> None:
    """A mean 1000 times the deviation: a variance from sums of squares would have no digit left."""
    inputs = pool_inputs(1, 9, 64, "fp32", seed=2)
    inputs[0] = inputs[0] + 1000.0
    expected, _ = pooled(inputs, "fp32")
    torch.testing.assert_close(run_pool(cpu, inputs, "fp32").double(), expected, rtol=0, atol=2e-2)


def test_norm_bias_and_score_bias_move_nothing(cpu: CpuDevice) -> None:
    """They shift all scores alike; the kernel does not read them."""
    inputs = pool_inputs(1, 9, 16, "fp32", seed=3)
    moved = [inputs[0], inputs[1], inputs[2] + 5, inputs[3], inputs[4] - 7]
    assert torch.equal(run_pool(cpu, inputs, "fp32"), run_pool(cpu, moved, "fp32"))
    eager = [ops.summary_pool(*each, epsilon=EPSILON) for each in (inputs, moved)]
    torch.testing.assert_close(*eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("rows", [1, 9, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_stays_one(cpu: CpuDevice, element: Element, rows: int, value: float) -> None:
    """Wherever it stands: in a part of its own, in the last, beside others."""
    for row in {0, rows // 2, rows - 1}:
        inputs = pool_inputs(2, rows, 16, element, seed=4)
        inputs[0][0, row, 5] = value
        found = run_pool(cpu, inputs, element)
        assert found[0].isnan().all()
        assert not found[1].isnan().any()


def test_scores_of_minus_infinity_are_those_of_the_eager_op(cpu: CpuDevice) -> None:
    """A softmax of nothing else is no number; zeros are for groups without rows."""
    inputs = pool_inputs(2, 9, 8, "fp32", seed=7)
    inputs[0][..., 0] = -9.0
    inputs[1:4] = torch.ones(8), torch.zeros(8), torch.tensor([[float("inf"), *[0.0] * 7]])
    assert ops.summary_pool(*inputs, epsilon=EPSILON).isnan().all()
    assert run_pool(cpu, inputs, "fp32").isnan().all()


@pytest.mark.parametrize("element", ELEMENTS)
def test_subnormal_tokens_are_not_flushed(cpu: CpuDevice, element: Element) -> None:
    inputs = pool_inputs(2, 9, 64, element, seed=8)
    tiny = {"fp32": 2.0**-149, "fp16": 2.0**-24, "bf16": 2.0**-133}[element]
    inputs[0] = (torch.randint(1, 64, inputs[0].shape).double() * tiny).to(DTYPES[element])
    found = run_pool(cpu, inputs, element).double()
    expected, tolerance = pooled(inputs, element)
    assert ((found - expected).abs() <= tolerance).all()
    assert (found > 0).all()


@pytest.mark.parametrize("element", ["fp16", "bf16"])
def test_every_value_of_a_half_goes_through_unchanged(cpu: CpuDevice, element: Element) -> None:
    """One row is its own summary, which converts every bit pattern to fp32 and back."""
    tokens = finite_patterns(element, (16, 1, 4096), torch.device("cpu"))
    width = tokens.shape[2]
    weights = [torch.zeros(*shape, dtype=tokens.dtype) for shape in ((width,), (width,), (1, width), (1,))]
    assert torch.equal(run_pool(cpu, [tokens, *weights], element), tokens)


def rounds_to_nearest(cpu: CpuDevice, element: Element, seed: int) -> bool:
    """Two rows of equal score have their mean as summary: often a tie between two neighbours."""
    random = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 4, (1024,), generator=random)
    tokens = (torch.randn(1, 2, 1024, generator=random) * scale).to(DTYPES[element])
    zeros = [torch.zeros(*shape, dtype=tokens.dtype) for shape in ((1024,), (1024,), (1, 1024), (1,))]
    found = run_pool(cpu, [tokens, *zeros], element)
    return torch.equal(found, tokens.float().mean(1, keepdim=True).to(tokens.dtype))


@settings(max_examples=30, deadline=None)
@given(element=st.sampled_from(["fp16", "bf16"]), seed=SEED)
def test_results_are_rounded_to_nearest_as_pytorch_does(cpu: CpuDevice, element: Element, seed: int) -> None:
    assert rounds_to_nearest(cpu, element, seed)


def test_the_order_of_threads_does_not_matter(cpu: CpuDevice) -> None:
    inputs = pool_inputs(2, 37, 40, "fp32", seed=5)
    found = [run_pool(cpu, inputs, "fp32", seed=seed) for seed in range(4)]
    assert all(torch.equal(found[0], each) for each in found)


def test_no_images_are_no_summaries(cpu: CpuDevice) -> None:
    inputs = pool_inputs(0, 9, 16, "fp32", seed=6)
    assert run_pool(cpu, inputs, "fp32").shape == (0, 1, 16)
