"""Skip-Vision (arXiv 2503.21817) in PyTorch: the method, its training and its cost, and nothing else."""

from __future__ import annotations

__version__ = "0.1.0"
