"""Faults planted in the kernels' source are caught by what test_kernels.py compares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.kernel_cases import gathered, pooled
from svcli_engines.plugins.compile import SOURCE
from tests.plugins.cpu_device import CpuDevice, KernelFault
from tests.plugins.test_kernels import (
    pool_inputs,
    rounds_to_nearest,
    run_gather,
    run_merge,
    run_partial,
    run_pool,
)

pytestmark = pytest.mark.slow

GATHER = {
    "an index off by one": ("if (picked < 0) picked += num_rows;", "picked += picked < 0 ? num_rows : 1;"),
    "no index from the end": ("if (picked < 0) picked += num_rows;", ""),
    "the row behind the last": ("picked < num_rows;", "picked <= num_rows;"),
    "rows before the first": ("picked >= 0 && picked", "picked"),
    "an index of 32 bits": ("long long picked = index", "int picked = index"),
    "heads as batches": ("heads == 1 ? group : group / heads", "group"),
    "the unit of the first": ("unit += unit_step;", ""),
    "the row of the first": ("row += row_step;", ""),
    "no carry into the row": ("        ++row;\n", ""),
    "a unit too many before the carry": ("if (unit >= units) {", "if (unit > units) {"),
    "rows behind the last": ("row < total_rows ? row : total_rows - 1", "row"),
    "an empty grid divides": ("if (total == 0) return;", ""),
    "one head": ("heads == 1 ? group : group / heads", "group / heads * heads"),
    "writing behind the end": ("if (place < total) to", "to"),
    "one access size for all": ("if (shared_alignment % kAccessBytes == 0) {", "if (true) {"),
    "alignment of rows only": ("address_of(data) | address_of(rows) |", "0 |"),
    "one round": ("start < total; start += step", "start < total; start = total"),
    "zeros are read": ("source[k] < 0 ? Unit{} : from[source[k]]", "from[source[k] < 0 ? 0 : source[k]]"),
}
POOL = {
    "no greatest score": ("greatest = fmaxf(greatest, shared.score[r]);", "greatest = 0.0f;"),
    "a row too few in the greatest": (
        "for (int r = 0; r < kRows; ++r) greatest",
        "for (int r = 1; r < kRows; ++r) greatest",
    ),
    "mean of the padding": ("u * kTeamThreads + member < units ? mean[0] : 0.0f", "mean[0]"),
    "mean of the first lane's unit": ("u * kTeamThreads + member < units ? mean[0]", "member < units ? mean[0]"),
    "no mean": ("mean[0] *= inverse_width;", "mean[0] = 0.0f;"),
    "no epsilon": ("spread[0] * inverse_width + epsilon", "spread[0] * inverse_width"),
    "variance of a sample": ("rsqrtf(spread[0] * inverse_width", "rsqrtf(spread[0] / (width - 1.0f)"),
    "half of the warp": ("offset = kWarpSize / 2; offset > 0", "offset = kWarpSize / 2; offset > 1"),
    "no barrier in a team": (" values[i];\n    }\n    __syncthreads();", " values[i];\n    }"),
    "a barrier for some": ("if (first > 0) load(row);", "if (row >= count) continue;\n    if (first > 0) load(row);"),
    "one buffer for both sums": ("(spread, shared.partial[1])", "(spread, shared.partial[0])"),
    "the first team for all": ("warp / kTeamWarps * kTeamWarps", "0"),
    "a team for every warp": ("if constexpr (kTeamWarps > 1)", "if constexpr (kTeamWarps > 8)"),
    "the rows of the first round": ("if (first > 0) load(row);", ""),
    "one round": ("first += kTeams) {", "first += kRows) {"),
    "rows behind the last": ("row < count && unit < units ? from[unit]", "unit < units ? from[unit]"),
    "units behind the last": ("row < count && unit < units ? from[unit]", "row < count ? from[unit]"),
    "weights behind the last": (
        "unit < units ? reinterpret_cast<const Unit*>(norm_weight)[unit] : Unit{}",
        "reinterpret_cast<const Unit*>(norm_weight)[unit]",
    ),
    "scales behind the last are not set": ("kSlots % kPartialThreads != 0 && unit >= kSlots", "unit >= units"),
    "no barrier before scales are read": ("= scale;\n    }\n  }\n  __syncthreads();", "= scale;\n    }\n  }"),
    "no barrier before scores are read": ("  __syncthreads();\n\n  float greatest", "\n  float greatest"),
    "scales of one group": ("(u * kGroups + g) * kTeamThreads", "u * kGroups * kTeamThreads"),
    "no norm weight": ("element_of(norm, g * kGroup + j) * ", ""),
    "the norm weight of another": ("element_of(norm, g * kGroup + j)", "element_of(norm, 0)"),
    "rows that there are not score": ("row < count ? score : minus_infinity()", "score"),
    "rows that there are not weigh": ("r < count ? expf", "true ? expf"),
    "rows that there are not are summed": ("held[r] = r < count ? from[unit] : Unit{};", "held[r] = from[unit];"),
    "no weights": ("weight[r] * element_of", "element_of"),
    "accesses that are not aligned": ("if (!wide) {", "if (false) {"),
    "states that are not aligned": ("wide && address_of(partial) % sizeof(Floats<2>) == 0", "wide"),
    "pairs of a row that is odd": ("wide && address_of(partial)", "address_of(partial)"),
    "weights that are not aligned": ("address_of(tokens) | address_of(norm_weight) |", "address_of(tokens) |"),
    "long rows as short ones": ("width <= kWarpSize * kShortLane", "width <= kWarpSize * kWideLane"),
    "the longest rows as long ones": ("} else if (width <= kWarpSize * kWideLane) {", "} else if (true) {"),
    "every part is the first": ("(blockIdx.x - image * num_parts) * kRows", "0"),
    "every image is the first": ("(static_cast<long long>(image) * num_rows + first) * width", "first * width"),
    "images that there are not": ("image >= num_images || width > kMaxWidth", "width > kMaxWidth"),
    "the greatest score is not told": ("sums[width] = greatest;", "sums[width] = 0.0f;"),
    "the sum of weights is not told": ("sums[width + 1] = total;", "sums[width + 1] = 1.0f;"),
    "sum not rescaled": ("    sum *= rescale;\n", ""),
    "weights not rescaled": ("    total *= rescale;\n", ""),
    "parts not rescaled": ("sum += part_sum[k] * weight;", "sum += part_sum[k];"),
    "parts behind the last": ("part_sum[k] = part < num_parts && column", "part_sum[k] = column"),
    "columns behind the last are read": ("part < num_parts && column < width ?", "part < num_parts ?"),
    "columns behind the last are written": ("if (warp > 0 || column >= width) return;", "if (warp > 0) return;"),
    "every warp takes all parts": ("for (int first = warp; first", "for (int first = 0; first"),
    "one turn of parts": ("first += kMergeWarps * kMergeUnroll", "first += num_parts"),
    "no barrier between warps": ("= sum;\n  __syncthreads();", "= sum;"),
    "warps not rescaled": ("sum += shared.sum[each][lane] * weight;", "sum += shared.sum[each][lane];"),
    "the first warp for all": ("sum += shared.sum[each][lane]", "sum += shared.sum[0][lane]"),
    "no rows": ("total == 0.0f ? 0.0f : sum / total", "sum / total"),
    "every summary is the first": ("summary[static_cast<long long>(image) * width + column]", "summary[column]"),
    "states of the first image": ("static_cast<long long>(image) * num_parts * (width + 2)", "0"),
    "columns of the first block": ("(blockIdx.x - image * blocks) * kWarpSize + lane", "lane"),
}  # fmt: skip
ROUNDING = {
    "cut off": ("(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16"),
    "ties up": ("0x7fffu + ((bits >> 16) & 1u)", "0x8000u"),
}


def mutant(tmp_path: Path, cpu: CpuDevice, before: str, after: str) -> CpuDevice:
    source = SOURCE.read_text(encoding="utf-8")
    assert source.count(before) == 1, f"stands {source.count(before)} times in kernels.cu: {before}"
    changed = tmp_path / "kernels.cu"
    changed.write_text(source.replace(before, after), encoding="utf-8")
    return cpu.with_source(changed)


def gather_verdicts(device: CpuDevice) -> Iterator[bool]:
    random = torch.Generator().manual_seed(0)
    for shape, taken, shift in (
        ((2, 5, 8), 4, 0),
        ((2, 5, 8), 4, 1),
        ((2, 3, 5, 6), 3, 0),
        ((1, 4, 3), 2, 0),
        ((1, 9, 513), 30, 0),
        ((1, 9, 4), 700, 0),
        ((1, 9, 1540), 5, 0),
        ((2, 5, 8), 0, 0),
        ((1, 4, 0), 2, 0),
    ):
        data = torch.randn(shape, generator=random)
        index = torch.randint(-shape[-2] - 1, shape[-2] + 1, (shape[0], taken), generator=random)
        if taken:
            index[0, -1], index[0, 0] = shape[-2], -shape[-2] - 1
        for side in ("start", "end"):
            yield torch.equal(run_gather(device, data, index, "fp32", side, shift), gathered(data, index))
    far = torch.tensor([[2**32 + 1]])
    yield torch.equal(run_gather(device, torch.ones(1, 3, 8), far, "fp32"), torch.zeros(1, 1, 8))


def pool_verdicts(device: CpuDevice) -> Iterator[bool]:
    for shape, shift, epsilon, scale in (
        ((2, 150, 16), 0, 1e-5, 4.0),
        ((2, 600, 8), 0, 1e-5, 4.0),
        ((2, 37, 13), 0, 1.0, 4.0),
        ((1, 9, 8), 1, 1e-5, 4.0),
        ((2, 21, 40), 0, 1e-5, 100.0),
        ((1, 11, 1028), 0, 1e-5, 4.0),
        ((1, 11, 1028), 1, 1e-5, 4.0),
        ((1, 7, 4100), 0, 1e-5, 4.0),
        ((1, 0, 8), 0, 1e-5, 4.0),
        ((0, 9, 8), 0, 1e-5, 4.0),
    ):
        inputs = pool_inputs(*shape, "fp32", shape[1], scale)
        expected, tolerance = pooled(inputs, "fp32", epsilon)
        for side in ("start", "end"):
            found = run_pool(device, inputs, "fp32", epsilon=epsilon, shift=shift, seed=shape[1], side=side)
            yield bool(((found.double() - expected).abs() <= tolerance).all())
    yield from halves_verdicts(device)
    yield from separate_verdicts(device)


def halves_verdicts(device: CpuDevice) -> Iterator[bool]:
    """Where an access holds two groups of scales, and where pairs are of 32 bits."""
    for width in (16, 1032):
        inputs = pool_inputs(1, 11, width, "bf16", seed=width, scale=4.0)
        expected, tolerance = pooled(inputs, "bf16")
        yield bool(((run_pool(device, inputs, "bf16").double() - expected).abs() <= tolerance).all())


def separate_verdicts(device: CpuDevice) -> Iterator[bool]:
    """A score whose exponential is zero, alone in its part; and tensors that are not aligned alike."""
    far_below = pool_inputs(1, 1, 16, "fp32", seed=5)
    far_below[3] = -200 * far_below[0][0] * far_below[1]
    yield torch.equal(run_pool(device, far_below, "fp32"), far_below[0])
    inputs = pool_inputs(1, 9, 16, "fp32", seed=5, scale=4.0)
    expected, tolerance = pooled(inputs, "fp32")
    for shifts in ((0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        states = run_partial(device, inputs, "fp32", shifts=shifts)
        found = run_merge(device, states, inputs[1], "fp32")
        yield bool(((found.double() - expected).abs() <= tolerance).all())


def caught(verdicts: Iterator[bool]) -> bool:
    try:
        return not all(verdicts)
    except KernelFault:
        return True


def test_the_kernels_themselves_pass(cpu: CpuDevice) -> None:
    assert not caught(gather_verdicts(cpu))
    assert not caught(pool_verdicts(cpu))
    assert rounds_to_nearest(cpu, "bf16", seed=0)


@pytest.mark.parametrize(("before", "after"), GATHER.values(), ids=GATHER.keys())
def test_a_fault_in_token_gather_is_caught(tmp_path: Path, cpu: CpuDevice, before: str, after: str) -> None:
    assert caught(gather_verdicts(mutant(tmp_path, cpu, before, after)))


@pytest.mark.parametrize(("before", "after"), POOL.values(), ids=POOL.keys())
def test_a_fault_in_summary_pool_is_caught(tmp_path: Path, cpu: CpuDevice, before: str, after: str) -> None:
    assert caught(pool_verdicts(mutant(tmp_path, cpu, before, after)))


@pytest.mark.parametrize(("before", "after"), ROUNDING.values(), ids=ROUNDING.keys())
def test_a_fault_in_rounding_is_caught(tmp_path: Path, cpu: CpuDevice, before: str, after: str) -> None:
    assert not rounds_to_nearest(mutant(tmp_path, cpu, before, after), "bf16", seed=0)
