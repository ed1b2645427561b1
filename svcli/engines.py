"""Engines by the names that users type."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from svcli.errors import UsageError

if TYPE_CHECKING:
    from svcli_engines.base import Engine, Pool
    from svcli_export.manifest import Manifest
    from svcli_export.runtime import Provider

_POOL_BYTES = 1 << 30
_MOST_SLOTS = 8


class EngineName(str, Enum):
    """What runs a bundle."""

    ONNXRUNTIME = "onnxruntime"
    ONNXRUNTIME_CUDA = "onnxruntime-cuda"
    TORCH = "torch"
    TORCH_CUDA = "torch-cuda"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


def open_engine(
    name: EngineName, bundle: Path, manifest: Manifest, *, threads: int | None = None, compiled: bool = False
) -> Engine:
    """`threads` are for onnxruntime, `compiled` is for torch.

    Raises UsageError for threads of another engine, for a variant in TensorRT, or what the engine raises.
    """
    on_gpu = name in (EngineName.ONNXRUNTIME_CUDA, EngineName.TORCH_CUDA)
    is_onnxruntime = name in (EngineName.ONNXRUNTIME, EngineName.ONNXRUNTIME_CUDA)
    if threads is not None and not is_onnxruntime:
        raise UsageError(f"--threads is for onnxruntime, not for {name.value}")
    if is_onnxruntime:
        from svcli_engines.onnx_engine import OnnxEngine

        return OnnxEngine(bundle, manifest, provider="cuda" if on_gpu else "cpu", num_threads=threads)
    if name in (EngineName.TORCH, EngineName.TORCH_CUDA):
        from svcli_engines.torch_engine import TorchEngine

        return TorchEngine.of_bundle(bundle, manifest, device="cuda" if on_gpu else "cpu", compiled=compiled)
    if manifest.contract.variant:
        raise UsageError(
            f"TensorRT plans are of a bundle's own graphs, not of its variant {manifest.contract.variant}; choose"
            " another engine, or export the setting as a bundle of its own"
        )
    from svcli_engines.tensorrt_engine import TensorRTEngine

    return TensorRTEngine(bundle, manifest, backend="tensorrt" if name is EngineName.TENSORRT else "tensorrt-rtx")


def open_pool(
    name: EngineName, bundle: Path, manifest: Manifest, *, threads: int | None = None, parallel: int | None = None
) -> Pool:
    """`parallel` sequences side by side; or else as many as fit 1 GiB of KV cache, up to 8, where the engine can.

    Raises UsageError for several of an engine that runs one, or what the engine raises.
    """
    from svcli_engines.base import Alone

    if name in (EngineName.ONNXRUNTIME, EngineName.ONNXRUNTIME_CUDA):
        from svcli_engines.onnx_engine import OnnxPool

        contract = manifest.contract
        fitting = _POOL_BYTES // (contract.capacity * contract.kv_bytes_per_row)
        num_slots = parallel or max(1, min(_MOST_SLOTS, fitting))
        provider: Provider = "cuda" if name is EngineName.ONNXRUNTIME_CUDA else "cpu"
        return OnnxPool(bundle, manifest, provider=provider, num_threads=threads, num_slots=num_slots)
    if parallel is not None and parallel > 1:
        raise UsageError(f"{name.value} runs one sequence at a time; leave --parallel out")
    return Alone(open_engine(name, bundle, manifest, threads=threads))
