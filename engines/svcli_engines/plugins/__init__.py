"""TokenGather and SummaryPool as TensorRT plugins: CUDA source, its compilation, how it is launched and registered."""

from __future__ import annotations
