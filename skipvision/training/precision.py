"""What training computes in."""

from __future__ import annotations

import torch


def compute_dtype() -> torch.dtype:
    """bf16 where this CPU multiplies it in hardware, else fp32."""
    capabilities = torch.cpu.get_capabilities()
    fast = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32
