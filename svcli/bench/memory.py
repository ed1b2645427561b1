"""Peak memory of one side, in a process of its own that opens nothing else."""

from __future__ import annotations

import ctypes
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

from svcli.bench.contestants import ON_GPU, Asked, Graphs
from svcli.bench.energy import Nvml, NvmlError

_STATUS = Path("/proc/self/status")


def peaks(graphs: Graphs, asked: Asked, num_tokens: int) -> tuple[int | None, int | None]:
    """Resident bytes at most, and by how much the GPU's memory in use grew; None where nothing tells.

    Raises what answering does.
    """
    # Spawned: what this process holds must not count.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(_answer, graphs, asked, num_tokens).result()
        except BrokenProcessPool:
            return None, None


def resident_peak(status: Path = _STATUS) -> int | None:
    """Of this process, by the kernel; None where it does not tell."""
    with suppress(OSError, ValueError):
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return None


def _answer(graphs: Graphs, asked: Asked, num_tokens: int) -> tuple[int | None, int | None]:
    before = _gpu_bytes() if graphs.engine in ON_GPU else None
    contestant = graphs.open(asked)
    try:
        contestant.answer(num_tokens)
        behind = None if before is None else _gpu_bytes()
    finally:
        contestant.close()
    return resident_peak(), None if before is None or behind is None else behind - before


def _gpu_bytes() -> int | None:
    """In use on the GPU; None where NVML is not there, or does not tell."""
    with suppress(OSError, AttributeError, NvmlError):
        return Nvml(ctypes.CDLL("libnvidia-ml.so.1")).used_bytes()
    return None
