"""A picture as the model's input: padded to a square with the mean colour, resized, normalised. Imports no torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from svcli_export.manifest import ImageProcessing


def to_pixels(image: Image.Image, processing: ImageProcessing) -> npt.NDArray[np.float32]:
    """[3, S, S] from an RGB picture of any size. It is resized before it is padded, so that padding stays flat."""
    size = processing.image_size
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGB", (size, size), tuple(round(255 * channel) for channel in processing.mean))
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(small, ((size - width) // 2, (size - height) // 2))
    values = np.asarray(square, np.float32) / 255
    normalised = (values - np.array(processing.mean, np.float32)) / np.array(processing.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))
