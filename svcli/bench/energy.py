"""Joules, where the machine counts them: the RAPL counters of a CPU, NVML of a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
_MICRO, _MILLI = 1e-6, 1e-3
NOT_TOLD = "not told by this machine"


class Counter:
    """One source of energy readings, which may wrap around."""

    def __init__(self, read: Callable[[], int], unit: float, wraps_at: int | None = None) -> None:
        self._read, self._unit, self._wraps_at = read, unit, wraps_at
        self._before = read()

    def start(self) -> None:
        self._before = self._read()

    def joules(self) -> float:
        """Since `start`."""
        used = self._read() - self._before
        if used < 0 and self._wraps_at is not None:
            used += self._wraps_at
        return used * self._unit


def counters(on_gpu: bool, powercap: Path = POWERCAP) -> dict[str, Counter]:
    """What can be read here, by what tells it; empty where nothing can be."""
    found = dict(rapl(powercap))
    if on_gpu:
        with suppress(OSError, AttributeError, NvmlError):
            nvml = Nvml(ctypes.CDLL("libnvidia-ml.so.1"))
            found["NVML, GPU 0"] = Counter(nvml.millijoules, _MILLI)
    return found


def rapl(powercap: Path) -> Mapping[str, Counter]:
    """The packages of the CPU: zones such as `intel-rapl:0`, without what lies inside of them."""
    found = {}
    for zone in sorted(powercap.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:
            continue
        with suppress(OSError, ValueError):  # since 2020 root alone may read them, on most systems
            named = (zone / "name").read_text(encoding="ascii").strip()
            wraps_at = int((zone / "max_energy_range_uj").read_text(encoding="ascii"))
            found[f"RAPL, {named}"] = Counter(_file(zone / "energy_uj"), _MICRO, wraps_at)
    return found


def _file(path: Path) -> Callable[[], int]:
    return lambda: int(path.read_text(encoding="ascii"))


class NvmlError(Exception):
    """What the library says it cannot tell."""


class Nvml:
    """NVIDIA's management library, of which two functions are wanted; of the first GPU."""

    def __init__(self, library: Any) -> None:
        """`library`: loaded by ctypes. Raises NvmlError, or AttributeError for one that is too old."""
        self._library = library
        self._gpu = ctypes.c_void_p()
        self._check(library.nvmlInit_v2())
        self._check(library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._gpu)))

    def millijoules(self) -> int:
        """Since the driver was loaded."""
        counted = ctypes.c_ulonglong()
        self._check(self._library.nvmlDeviceGetTotalEnergyConsumption(self._gpu, ctypes.byref(counted)))
        return counted.value

    def used_bytes(self) -> int:
        """Memory in use, by everybody."""
        told = (ctypes.c_ulonglong * 3)()  # total, free, used
        self._check(self._library.nvmlDeviceGetMemoryInfo(self._gpu, ctypes.byref(told)))
        return told[2]

    def _check(self, status: int) -> None:
        if status != 0:
            raise NvmlError(f"status {status}")
