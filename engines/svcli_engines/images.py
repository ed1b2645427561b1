"""Opening pictures that people have, for whoever knows engines alone."""

from __future__ import annotations

from skipvision.pictures import ImageError, LoadedImage, open_image

__all__ = ["ImageError", "LoadedImage", "open_image"]
