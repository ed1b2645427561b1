"""Engines by the names that users type."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from svcli.errors import UsageError

if TYPE_CHECKING:
    from svcli_engines.base import Engine
    from svcli_export.manifest import Manifest


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
