"""Engines by the names that users type."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from svcli.errors import UsageError

if TYPE_CHECKING:
    from svcli_engines.base import Engine, Pool
    from svcli_engines.plans import Backend
    from svcli_engines.torch_engine import Device
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
    _check_threads(name, threads)
    if name in (EngineName.ONNXRUNTIME, EngineName.ONNXRUNTIME_CUDA):
        from svcli_engines.onnx_engine import OnnxEngine

        return OnnxEngine(bundle, manifest, provider="cuda" if on_gpu else "cpu", num_threads=threads)
    if name in (EngineName.TORCH, EngineName.TORCH_CUDA):
        from svcli_engines.torch_engine import TorchEngine

        return TorchEngine.of_bundle(bundle, manifest, device="cuda" if on_gpu else "cpu", compiled=compiled)
    from svcli_engines.tensorrt_engine import TensorRTEngine

    return TensorRTEngine(bundle, manifest, backend=_backend(name, manifest))


def _check_threads(name: EngineName, threads: int | None) -> None:
    if threads is not None and name not in (EngineName.ONNXRUNTIME, EngineName.ONNXRUNTIME_CUDA):
        raise UsageError(f"--threads is for onnxruntime, not for {name.value}")


def _backend(name: EngineName, manifest: Manifest) -> Backend:
    """Of a TensorRT engine. Raises UsageError for a variant."""
    if manifest.contract.variant:
        raise UsageError(
            f"TensorRT plans are of a bundle's own graphs, not of its variant {manifest.contract.variant}; choose"
            " another engine, or export the setting as a bundle of its own"
        )
    return "tensorrt" if name is EngineName.TENSORRT else "tensorrt-rtx"


def open_pool(
    name: EngineName, bundle: Path, manifest: Manifest, *, threads: int | None = None, parallel: int | None = None
) -> Pool:
    """`parallel` sequences side by side; or else as many as fit 1 GiB of KV cache, up to 8, or as plans are built for.

    `threads` are for onnxruntime. Raises UsageError as `open_engine` does, or what the pool raises.
    """
    _check_threads(name, threads)
    if name in (EngineName.TENSORRT, EngineName.TENSORRT_RTX):
        from svcli_engines.tensorrt_engine import TensorRTPool

        return TensorRTPool(bundle, manifest, backend=_backend(name, manifest), num_slots=parallel)
    contract = manifest.contract
    fitting = _POOL_BYTES // (contract.capacity * contract.kv_bytes_per_row)
    num_slots = parallel or max(1, min(_MOST_SLOTS, fitting))
    if name in (EngineName.TORCH, EngineName.TORCH_CUDA):
        from svcli_engines.torch_engine import TorchPool

        device: Device = "cuda" if name is EngineName.TORCH_CUDA else "cpu"
        return TorchPool.of_bundle(bundle, manifest, device=device, num_slots=num_slots)
    from svcli_engines.onnx_engine import OnnxPool

    provider: Provider = "cuda" if name is EngineName.ONNXRUNTIME_CUDA else "cpu"
    return OnnxPool(bundle, manifest, provider=provider, num_threads=threads, num_slots=num_slots)
