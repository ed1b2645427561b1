"""Engines by the names that users type."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from svcli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from svcli_engines.base import Engine, Logits, Pool
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

    Raises UsageError for threads of another engine, or what the engine raises.
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
    from svcli_engines.tensorrt_engine import TensorRTEngine

    return TensorRTEngine(bundle, manifest, backend="tensorrt" if name is EngineName.TENSORRT else "tensorrt-rtx")


def open_pool(
    name: EngineName, bundle: Path, manifest: Manifest, *, num_slots: int | None = None, threads: int | None = None
) -> Pool:
    """`num_slots` sequences side by side; left out, as many as suit the engine.

    Raises UsageError for several of an engine that runs one, or what `open_engine` raises.
    """
    is_onnxruntime = name in (EngineName.ONNXRUNTIME, EngineName.ONNXRUNTIME_CUDA)
    if not is_onnxruntime and (num_slots or 1) > 1:
        raise UsageError(f"--parallel is for onnxruntime; {name.value} makes one answer at a time")
    num_slots = num_slots or (4 if is_onnxruntime else 1)
    return _Side([open_engine(name, bundle, manifest, threads=threads) for _ in range(num_slots)])


class _Side:
    """Engines side by side that share nothing."""

    def __init__(self, slots: Sequence[Engine]) -> None:
        self.slots = slots

    def step(self, new_ids: Mapping[int, int]) -> dict[int, Logits]:
        return {slot: self.slots[slot].extend([token]) for slot, token in new_ids.items()}

    def close(self) -> None:
        for slot in self.slots:
            slot.close()
