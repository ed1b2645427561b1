"""Machines that never were, for tests of what works where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from svcli_engines.environment import (
    PACKAGES,
    Cuda,
    Environment,
    Gpu,
    Machine,
    Model,
    OnnxRuntime,
    Package,
    Place,
    Plugins,
    TensorRT,
    Torch,
)

LIGHT = {"numpy", "pillow", "tokenizers", "jinja2", "pydantic", "onnxruntime"}
"""What `svcli[cpu]` installs."""
EVERYTHING = set(PACKAGES) - {"onnxruntime"}
H200 = Gpu("NVIDIA H200", "9.0", 143771 << 20)
CPU_ONLY = OnnxRuntime("1.31.1", ("CPUExecutionProvider",))
WITH_CUDA = OnnxRuntime("1.31.1", ("CUDAExecutionProvider", "CPUExecutionProvider"))


def laptop(installed: set[str] = LIGHT, **changes: Any) -> Environment:
    """No GPU; what `installed` names is there, TensorRT as it says itself."""
    packages = tuple(
        Package(name, PACKAGES[name][0], "1.0") if name in installed else Package(name, None, None) for name in PACKAGES
    )
    flavours = tuple(
        TensorRT(name, "10.16.0") if name in installed else TensorRT(name, problem="not installed")
        for name in ("tensorrt", "tensorrt-rtx")
    )
    found = Environment(
        python="3.12.1",
        executable="/venv/bin/python",
        machine=Machine("Linux-6.8-x86_64", 8, 16 << 30, 9 << 30),
        packages=packages,
        onnxruntime=CPU_ONLY
        if installed & {"onnxruntime", "onnxruntime-gpu"}
        else OnnxRuntime(problem="not installed"),
        torch=Torch(),
        cuda=Cuda(problem="libcuda.so.1 is not there"),
        tensorrt=flavours,
        plugins=Plugins("nvrtc 13.0") if "nvrtc" in installed else Plugins(problem="there is no CUDA compiler"),
        model=Model("/src/models/skipvision-tiny", "int8"),
        places=(Place("working folder", "/home/me", True, 5 << 30),),
    )
    return replace(found, **changes)


def server(installed: set[str] = EVERYTHING, **changes: Any) -> Environment:
    """One H200, and everything installed."""
    cuda = Cuda("580.65.06", "13.0", (H200,), "nvidia-smi")
    return laptop(installed, **{"cuda": cuda, "onnxruntime": WITH_CUDA, "torch": Torch("13.0"), **changes})
