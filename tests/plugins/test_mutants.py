"""Faults planted in the kernels' source are caught by what test_kernels.py compares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import gathered, pooled
from svcli_engines.plugins.compile import SOURCE
from tests.plugins.cpu_device import CpuDevice, KernelFault
from tests.plugins.test_kernels import pool_inputs, rounds_to_nearest, run_gather, run_pool

pytestmark = pytest.mark.slow

GATHER = {
    "an index off by one": ("if (picked < 0) picked += num_rows;", "picked += picked < 0 ? num_rows : 1;"),
    "no index from the end": ("if (picked < 0) picked += num_rows;", ""),
    "the row behind the last": ("picked < num_rows)", "picked <= num_rows)"),
    "rows before the first": ("picked >= 0 && picked", "picked"),
    "an index of 32 bits": ("long long picked = index", "int picked = index"),
    "heads as batches": ("heads == 1 ? group : group / heads", "group"),
    "one head": ("heads == 1 ? group : group / heads", "group / heads * heads"),
    "writing behind the end": ("if (place < total) to", "to"),
    "one access size for all": ("if (shared_alignment % kAccessBytes == 0) {", "if (true) {"),
    "alignment of rows only": ("address_of(data) | address_of(rows) |", "0 |"),
    "one round": ("start < total; start += step", "start < total; start = total"),
    "rows that there are not left out": (
        "values[k] = Unit{};\n      if (row < total_rows) {",
        "values[k] = Unit{};\n      if (row < total_rows && row % 2) {",
    ),
}
POOL = {
    "sum not rescaled": ("weighted[i] *= rescale;", ""),
    "weights not rescaled": ("total *= rescale;", ""),
    "no greatest score": ("new_greatest = fmaxf(new_greatest, score[r]);", "new_greatest = 0.0f;"),
    "mean of the padding": (
        "column(i) < width ? to_float(tile.values[r][i]) - mean[r] : 0.0f",
        "to_float(tile.values[r][i]) - mean[r]",
    ),
    "no epsilon": ("/ width + epsilon)", "/ width)"),
    "variance of a sample": ("rsqrtf(spread[2 * r] / width", "rsqrtf(spread[2 * r] / (width - 1.0f)"),
    "half of the warp": ("offset = kWarpSize / 2; offset > 0", "offset = kWarpSize / 2; offset > 1"),
    "no barrier in a team": (" values[i];\n  }\n  __syncthreads();", " values[i];\n  }"),
    "one buffer for both sums": ("(spread, shared.partial[1])", "(spread, shared.partial[0])"),
    "the first team for all": ("warp / kTeamWarps * kTeamWarps", "0"),
    "rows behind the last": ("if (row >= num_rows) continue;", ""),
    "a round less": (" + (num_rows % rows_of_round != 0)", ""),
    "columns behind the last": ("if (column(j) < width) tile.values[r][j]", "tile.values[r][j]"),
    "accesses that are not aligned": ("if (wide) {", "if (true) {"),
    "teams not rescaled": ("weighted[i] * shrink(greatest, block_max)", "weighted[i]"),
    "only the last team": ("each == 0 ? 0.0f : shared.sum[column(i)]", "0.0f"),
    "no barrier between teams": ("block_max);\n      }\n    }\n    __syncthreads();", "block_max);\n      }\n    }"),
    "every block takes the same rows": (
        "(round * kPoolBlocks + rank) * kRowsPerRound + team * kRowsAtOnce + r;\n      const",
        "round * kPoolBlocks * kRowsPerRound + team * kRowsAtOnce + r;\n      const",
    ),
    "the sum of one block": ("of_block(&shared.sum[at], each) *", "shared.sum[at] *"),
    "blocks not rescaled": (
        " * shrink(of_block(&shared.block_max, each), image_max);\n    }\n    summary",
        ";\n    }\n    summary",
    ),
    "no barrier before the others are read": ("cluster_sync();\n\n  float image_max", "float image_max"),
    "blocks leave too early": ("cluster_sync();  // no block", "// no block"),
    "no rows": ("image_total == 0.0f ? 0.0f : value", "value"),
    "every image is the first": ("static_cast<long long>(image) * num_rows * width", "0"),
    "no norm weight": ("to_float(norm_weight[column(i)]) * to_float", "to_float"),
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
    ):
        data = torch.randn(shape, generator=random)
        index = torch.randint(-shape[-2] - 1, shape[-2] + 1, (shape[0], taken), generator=random)
        index[0, -1], index[0, 0] = shape[-2], -shape[-2] - 1
        for side in ("start", "end"):
            yield torch.equal(run_gather(device, data, index, "fp32", side, shift), gathered(data, index))
    far = torch.tensor([[2**32 + 1]])
    yield torch.equal(run_gather(device, torch.ones(1, 3, 8), far, "fp32"), torch.zeros(1, 1, 8))


def pool_verdicts(device: CpuDevice) -> Iterator[bool]:
    for shape, shift, epsilon, scale in (
        ((2, 150, 16), 0, 1e-5, 4.0),
        ((2, 37, 13), 0, 1.0, 4.0),
        ((1, 9, 8), 1, 1e-5, 4.0),
        ((1, 70, 40), 0, 1e-5, 100.0),
        ((1, 11, 1028), 0, 1e-5, 4.0),
        ((1, 0, 8), 0, 1e-5, 4.0),
    ):
        inputs = pool_inputs(*shape, "fp32", shape[1], scale)
        expected, tolerance = pooled(inputs, "fp32", epsilon)
        found = run_pool(device, inputs, "fp32", epsilon=epsilon, num_blocks=2, shift=shift, seed=shape[1])
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
