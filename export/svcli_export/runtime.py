"""Opening a graph in ONNX Runtime, the same way for the check after export and for chat. Imports no torch."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from skipvision.config import ModelConfig
from skipvision.layout import Ints
from skipvision.tiles import Cut, mosaic
from svcli_export.contract import MOSAIC_INDEX, MOSAIC_WEIGHT, Contract

Floats = npt.NDArray[Any]
Provider = Literal["cpu", "cuda"]

_AT_ONCE = 4
"""Views, which bounds what the encoder's attention takes: a view of 1,024 patches has 12 million scores."""
_ERRORS_ONLY = 3
_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of malloc.h."""
_FUSES_INT8 = (1, 24)
"""ONNX Runtime 1.23, the last for Python 3.10, has no 8 bit kernel for one scale per channel."""


_SPINS_BRIEFLY = (1, 31)
"""The oldest ONNX Runtime in which the length of spinning was tried; without one, threads spin far too long."""


class ProviderError(ValueError):
    """What this installation of ONNX Runtime cannot do; one sentence with what mends it."""


def open_session(
    graph: Path, *, provider: Provider = "cpu", num_threads: int | None = None, lean: bool = False
) -> ort.InferenceSession:
    """`lean`: fp16 weights stay in the file and become fp32 one by one, where they are used, which takes its time. Or
    else, as the CPU computes in fp32, ONNX Runtime makes all of them fp32 while loading, twice as large as the file.

    Raises ProviderError for `cuda` where it cannot be had, or a graph that this ONNX Runtime cannot open."""
    try:
        str(graph).encode()
    except UnicodeEncodeError:
        raise ProviderError(f"{graph}: ONNX Runtime opens no path that is not UTF-8; rename the folder") from None
    _give_memory_back()
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    # A step has hundreds of products, and waking a thread for each takes as long as a small one. On a busy machine
    # threads that spin take the cores from those that work, so they do it for 20 us only, and never between steps.
    spins = _version() >= _SPINS_BRIEFLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spins else "0")
    if spins:
        options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if _version() >= _FUSES_INT8:
        # DequantizeLinear + MatMul become one 8 bit kernel. Level 4 lets it use the CPU's int8 dot products; -1 lets it
        # choose how many weights share a scale.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
        options.add_session_config_entry("session.qdq_matmulnbits_block_size", "-1")
    else:
        # int8 weights become fp32 once, while loading, instead of at every step.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    disabled: list[str] | None = None
    if lean:
        # Constant folding is one way to fp32 weights, fusing them into nodes (the level above this one) is the other.
        # Casts go first in the default order, all of them; by priority each comes before its product. An arena keeps
        # what it ever had.
        disabled = ["ConstantFolding"]
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.enable_cpu_mem_arena = False
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if provider == "cuda":
        providers.insert(0, _cuda_provider())
    try:
        session = ort.InferenceSession(str(graph), options, providers=providers, disabled_optimizers=disabled)
    except (Fail, InvalidGraph, NoKernel) as error:
        advice = "install a newer one, or export with precision int8"
        raise ProviderError(f"onnxruntime {ort.__version__} cannot open {graph.name}; {advice}") from error
    if provider == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise ProviderError("CUDA could not be started; see what `svcli doctor` says of the driver, or use the CPU")
    return session


def run_vision(
    session: ort.InferenceSession, contract: Contract, config: ModelConfig, pixels: Floats, cut: Cut | None
) -> tuple[Floats, Ints | None]:
    """Visual rows [I, V, D] of `pixels` [I, 3, S, S]: pictures that are seen once, or the views of one, joined as `cut`
    says where the model joins them. Also which tokens were retained [I, R], where the graph tells."""
    spec = contract.graph("vision")
    names = spec.input_names
    if MOSAIC_INDEX in names:
        assert cut is not None
        pieces = mosaic(config, cut)
        feeds = {"pixels": pixels, MOSAIC_INDEX: pieces.index, MOSAIC_WEIGHT: pieces.weight}
        runs = [session.run(spec.output_names, {name: feeds[name] for name in names})]
    else:
        parts = [pixels[first : first + _AT_ONCE] for first in range(0, len(pixels), _AT_ONCE)]
        runs = [session.run(spec.output_names, {"pixels": part}) for part in parts]
    visual, *retained = (np.concatenate(outputs) for outputs in zip(*runs, strict=True))
    return visual, retained[0] if retained else None


@cache
def _give_memory_back() -> None:
    """Lets glibc map what is larger than 1 MiB on its own, so that it goes back to the system when it is freed.

    By default glibc keeps blocks of up to 32 MiB for later. ONNX Runtime packs weights twice while loading, and the
    copies that it frees would stay: half of what a process holds behind int4 weights of a large model.
    """
    with suppress(AttributeError, OSError):  # a C library of another kind
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


def _version() -> tuple[int, int]:
    major, minor = ort.__version__.split(".")[:2]
    return int(major), int(minor)


def _cuda_provider() -> tuple[str, dict[str, str]]:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise ProviderError(
            "this onnxruntime has no CUDA; install svcli[gpu] in place of svcli[cpu] (`svcli doctor` has the command),"
            " or use the CPU"
        )
    # fp32 is what was asked for: TF32 has 10 bits of mantissa.
    return "CUDAExecutionProvider", {"use_tf32": "0"}
