"""How fast this machine could be at best: a product of matrices and a copy, measured here; or a GPU's data sheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

import numpy as np

from skipvision.roofline import GPUS
from svcli.bench.cpu import available_cores
from svcli.bench.product import product_runner
from svcli.bench.report import Roof

_SIDE, _GPU_SIDE = 1536, 8192
_REPEATS = 10
_LEAST_BYTES, _MOST_BYTES, _GPU_BYTES = 4 << 20, 256 << 20, 2 << 30
_DRIVER_NAMES: Mapping[str | None, str] = {
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA L40S": "l40s",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 3090": "rtx3090",
}
"""What the driver calls the GPUs whose peaks are known; others of a like name are slower."""


def cpu_roof(num_bytes: int, *, in_8_bits: bool, threads: int | None = None) -> Roof:
    """By ONNX Runtime and NumPy, the best of several.

    `in_8_bits`: the product is of bytes, as the kernels of int8 and int4 bundles are; or else of fp32. What is copied
    is as large as `num_bytes`, the weights of the decoder: those of a small model stay in the caches of the CPU, which
    are faster than its memory.
    """
    cores = threads or available_cores()
    seconds = _best(product_runner(_SIDE, cores, in_8_bits=in_8_bits))
    size = min(max(num_bytes, _LEAST_BYTES), _MOST_BYTES)
    # Half is read and half is written.
    parts = [np.ones(size // 2 // cores, np.uint8) for _ in range(cores)]
    pairs = [(np.empty_like(part), part) for part in parts]
    moved = 2 * sum(part.nbytes for part in parts)
    with ThreadPoolExecutor(cores) as pool:

        def copy() -> None:
            for done in [pool.submit(np.copyto, *pair) for pair in pairs]:
                done.result()

        copying = _best(copy, times=max(1, (64 << 20) // moved))
    kind = "8 bit" if in_8_bits else "fp32"
    return Roof(
        source=f"measured: a product of {_SIDE} x {_SIDE} in {kind} and a copy of {moved / 2**20:.0f} MiB,"
        f" {cores} threads",
        flops_per_second=2 * _SIDE**3 / seconds,
        bytes_per_second=moved / copying,
    )


def torch_cuda_roof(dtype: str) -> Roof:
    """By PyTorch on the GPU, in `float16` or `float32`, the best of several."""
    import torch

    kind = {"float16": torch.float16, "float32": torch.float32}[dtype]
    matrix = torch.ones(_GPU_SIDE, _GPU_SIDE, dtype=kind, device="cuda")
    source = torch.ones(_GPU_BYTES // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def run(call: Callable[[], Any]) -> float:
        def done() -> None:
            call()
            torch.cuda.synchronize()

        return _best(done)

    return Roof(
        source=f"measured: PyTorch's {dtype} matmul and a copy of {_GPU_BYTES >> 20} MiB on the GPU",
        flops_per_second=2 * _GPU_SIDE**3 / run(lambda: matrix @ matrix),
        bytes_per_second=_GPU_BYTES / run(lambda: target.copy_(source)),
    )


def sheet_roof(gpu: str | None) -> Roof | None:
    """Peaks of the GPU of this name, by its maker; None for one that is not known."""
    if gpu not in _DRIVER_NAMES:
        return None
    known = GPUS[_DRIVER_NAMES[gpu]]
    return Roof(
        source=f"data sheet of {known.title}, 16 bits; not measured",
        flops_per_second=known.flops_per_second,
        bytes_per_second=known.bytes_per_second,
    )


def _best(call: Callable[[], Any], times: int = 1, clock: Callable[[], float] = perf_counter) -> float:
    """Seconds of one call, of the fastest of several runs of `times` calls; the first run does not count."""
    found = []
    for _ in range(_REPEATS + 1):
        start = clock()
        for _ in range(times):
            call()
        found.append((clock() - start) / times)
    return min(found[1:])
