"""Where figures were measured: the machine, and versions of what ran."""

from __future__ import annotations

import os
import platform
from importlib.metadata import distributions
from pathlib import Path

from skipvision import __version__
from svcli.bench.report import Machine

_COUNTED = ("numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "torch")


def machine(gpu: str | None = None) -> Machine:
    """Ask before measuring: it notes how busy the machine was. `gpu`: name of the one that runs, if any."""
    return Machine(
        cpu=cpu_model(),
        cores=available_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu=gpu,
        load_before=round(os.getloadavg()[0], 2),
    )


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()  # on ARM, Linux names no model


def versions(names: tuple[str, ...] = _COUNTED) -> dict[str, str]:
    """Of svcli, Python, and what else of `names` is installed."""
    found = {each.name.lower(): each.version for each in distributions() if each.name}
    known = {name: found[name] for name in names if name in found}
    return {"svcli": __version__, "python": platform.python_version()} | known
