"""The terminal side of Skip-Vision: parse, call one library function, render."""

from __future__ import annotations

from skipvision import __version__

__all__ = ["__version__"]
