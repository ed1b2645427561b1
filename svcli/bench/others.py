"""How much of the CPU others took while something was measured."""

from __future__ import annotations

import os
from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from time import perf_counter, process_time

_STAT = Path("/proc/stat")
_LEAST_SECONDS = 1.0
"""The kernel counts in hundredths of a second, which says nothing of less."""
_IDLE = (3, 4)
"""Columns of idling and of waiting for a disk; guests, in the last two, are counted in the first two."""
_COLUMNS = 8


class Others:
    """From its making on, on the cores that this process may use."""

    def __init__(self, stat: Path = _STAT) -> None:
        self._stat, self._cores = stat, os.sched_getaffinity(0)
        self._busy = busy_seconds(stat, self._cores)
        self._own, self._start = process_time(), perf_counter()

    def cores(self) -> float | None:
        """How many cores' worth of time others took, what a host took from this machine with it; None where the kernel
        does not tell, or not in so short a time."""
        busy, own, seconds = busy_seconds(self._stat, self._cores), process_time() - self._own, perf_counter()
        seconds -= self._start
        if busy is None or self._busy is None or seconds < _LEAST_SECONDS:
            return None
        return round(max(0.0, (busy - self._busy - own) / seconds), 2)


def busy_seconds(stat: Path, cores: Set[int]) -> float | None:
    """What these cores have worked since the machine was started."""
    ticks = 0
    with suppress(OSError, ValueError):
        for line in stat.read_text(encoding="ascii").splitlines():
            name, *counted = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
                ticks += sum(int(each) for at, each in enumerate(counted[:_COLUMNS]) if at not in _IDLE)
        return ticks / os.sysconf("SC_CLK_TCK") if ticks else None
    return None
