"""What `svcli --version` says besides its own: from metadata and the kernel, with nothing imported."""

from __future__ import annotations

import platform
from collections.abc import Iterator

_SHOWN = ("onnxruntime", "onnxruntime-gpu", "torch", "tensorrt", "tensorrt-rtx")
_ALTERNATIVE = "onnxruntime-gpu"
"""Installed in place of another, so that nobody misses it."""


def versions() -> Iterator[tuple[str, str]]:
    """Names and versions of Python, of what may run a model, and of the NVIDIA driver."""
    from svcli_engines.environment import driver_version, package

    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in _SHOWN:
        version = package(name).version
        if version is not None or name != _ALTERNATIVE:
            yield name, version or "not installed"
    yield "NVIDIA driver", driver_version() or "none"
