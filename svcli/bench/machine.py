"""Where figures were measured: the machine, and versions of what ran."""

from __future__ import annotations

import os
import platform
from importlib.metadata import distributions

from skipvision import __version__
from svcli.bench.cpu import available_cores, cpu_model
from svcli.bench.report import Machine

_COUNTED = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "tensorrt", "tensorrt-cu13", "tensorrt-rtx-cu13", "torch",
)  # fmt: skip


def machine(gpu: str | None = None) -> Machine:
    """Ask before measuring: it notes how busy the machine was. `gpu`: name of the one that runs, if any."""
    return Machine(
        cpu=cpu_model(),
        cores=available_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu=gpu,
        load_before=round(os.getloadavg()[0], 2),
    )


def versions(names: tuple[str, ...] = _COUNTED) -> dict[str, str]:
    """Of svcli, Python, and what else of `names` is installed."""
    found = {each.name.lower(): each.version for each in distributions() if each.name}
    known = {name: found[name] for name in names if name in found}
    return {"svcli": __version__, "python": platform.python_version()} | known
