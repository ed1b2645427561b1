"""The tiny run of the package's own tests, for benchmarks that train."""

from __future__ import annotations

from tests.skipvision.conftest import art, encoder, features, recipe

__all__ = ["art", "encoder", "features", "recipe"]
