"""How fast a GPU could be at best: the longer of its FLOPs and its bytes, each at its peak. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peaks from the maker's data sheet, of dense matrix products in 16 bits with sums in fp32."""

    title: str
    flops_per_second: float
    bytes_per_second: float
    memory_bytes: int

    def seconds(self, flops: int, num_bytes: int) -> float:
        """No run is shorter; `num_bytes` are read once."""
        return max(flops / self.flops_per_second, num_bytes / self.bytes_per_second)


GPUS: Mapping[str, Gpu] = {
    "h200": Gpu("NVIDIA H200 SXM", 989e12, 4.8e12, 141 * 10**9),
    "h100": Gpu("NVIDIA H100 SXM", 989e12, 3.35e12, 80 * 10**9),
    "a100": Gpu("NVIDIA A100 SXM 80 GB", 312e12, 2.039e12, 80 * 10**9),
    "l40s": Gpu("NVIDIA L40S", 362e12, 0.864e12, 48 * 10**9),
    "l4": Gpu("NVIDIA L4", 121e12, 0.3e12, 24 * 10**9),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 165.2e12, 1.008e12, 24 * 10**9),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 71e12, 0.936e12, 24 * 10**9),
}
