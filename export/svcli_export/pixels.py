"""A picture as the model's input: cut into views where the model has tiles, each resized and normalised. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from skipvision.config import ModelConfig, TilesConfig
from skipvision.tiles import Cut, cut_picture, scaled_sizes
from svcli_export.manifest import ImageProcessing

Floats = npt.NDArray[np.float32]

_MOST_PIXELS = 1 << 27
"""Of a picture on the way to a square; a thread of one, padded or with its short side resized, would be gigabytes."""

_REACH = 5


@dataclass(frozen=True)
class Views:
    """One picture as the encoder sees it."""

    pixels: Floats
    """[num_views, 3, S, S]: thumbnail, then tiles line by line, where they are joined; or else tiles, thumbnail."""
    cut: Cut


def to_views(image: Image.Image, processing: ImageProcessing, config: ModelConfig, is_alone: bool = True) -> Views:
    """Of an RGB picture of any size; `is_alone` where no other picture is in the conversation."""
    cut = cut_picture(config, image.height, image.width, is_alone)
    return Views(_normalised(_squares(image, processing, config.tiles, cut), processing), cut)


def to_pixels(image: Image.Image, processing: ImageProcessing) -> Floats:
    """[3, S, S] of an RGB picture of any size that is not cut."""
    pixels: Floats = _normalised([to_square(image, processing)], processing)[0]
    return pixels


def _squares(
    image: Image.Image, processing: ImageProcessing, tiles: TilesConfig | None, cut: Cut
) -> Sequence[Image.Image]:
    side = processing.image_size
    if tiles is None or (tiles.is_joined and not cut.rows):
        return [to_square(image, processing)]
    if tiles.is_joined:
        mosaic = _inside(image, processing, cut.columns * side, cut.rows * side)
        return [_resized(image, processing, side, side), *_tiles(mosaic, side, cut)]
    # In two steps, each of which rounds to whole grey levels.
    for height, width in scaled_sizes(tiles.longest_edge, side, image.height, image.width):
        image = _resized(image, processing, width, height)
    return [*_tiles(image, side, cut), _resized(image, processing, side, side)]


def to_square(image: Image.Image, processing: ImageProcessing) -> Image.Image:
    """S x S, not normalised yet, of an RGB picture of any size that is not cut."""
    side = processing.image_size
    if processing.fit == "stretch":
        return _resized(image, processing, side, side)
    if processing.fit == "crop":
        return _middle(image, processing)
    longest = max(image.size)
    if processing.fit == "pad_first":
        colour = tuple(int(255 * channel) for channel in processing.mean)
        if longest**2 <= _MOST_PIXELS:
            return _resized(_centred(image, longest, longest, colour), processing, side, side)
    else:
        colour = tuple(round(255 * channel) for channel in processing.mean)
    # Resized before it is padded, so that padding stays flat.
    scale = side / longest
    width, height = (max(1, round(length * scale)) for length in image.size)
    return _centred(_resized(image, processing, width, height), side, side, colour)


def _middle(image: Image.Image, processing: ImageProcessing) -> Image.Image:
    side, shortest = processing.image_size, min(image.size)
    width, height = (side if length == shortest else int(side * length / shortest) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    if width * height <= _MOST_PIXELS:
        return _resized(image, processing, width, height).crop((left, top, left + side, top + side))
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + side) * across, (top + side) * down)
    # Such a picture is made larger, so that a filter reaches no farther than a few pixels.
    x, y = max(0, int(box[0]) - _REACH), max(0, int(box[1]) - _REACH)
    near = image.crop((x, y, min(image.width, int(box[2]) + _REACH), min(image.height, int(box[3]) + _REACH)))
    # Pillow goes along the lines first, where it resizes whole pictures.
    lines = near.resize((side, near.height), _filter(processing), (box[0] - x, 0, box[2] - x, near.height))
    return lines.resize((side, side), _filter(processing), (0, box[1] - y, side, box[3] - y))


def _inside(image: Image.Image, processing: ImageProcessing, width: int, height: int) -> Image.Image:
    """As large as fits, in the middle of black."""
    across, down = width / image.width, height / image.height
    if across < down:
        size = width, min(math.ceil(image.height * across), height)
    else:
        size = min(math.ceil(image.width * down), width), height
    return _centred(_resized(image, processing, *size), width, height, (0, 0, 0))


def _centred(image: Image.Image, width: int, height: int, colour: tuple[int, ...]) -> Image.Image:
    canvas = Image.new("RGB", (width, height), colour)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def _tiles(mosaic: Image.Image, side: int, cut: Cut) -> list[Image.Image]:
    corners = [(column * side, row * side) for row in range(cut.rows) for column in range(cut.columns)]
    return [mosaic.crop((left, top, left + side, top + side)) for left, top in corners]


def _resized(image: Image.Image, processing: ImageProcessing, width: int, height: int) -> Image.Image:
    return image.resize((width, height), _filter(processing))


def _filter(processing: ImageProcessing) -> Image.Resampling:
    return Image.Resampling[processing.resample.upper()]


def _normalised(squares: Sequence[Image.Image], processing: ImageProcessing) -> Floats:
    """[N, 3, S, S]"""
    values = np.stack([np.asarray(square) for square in squares]).astype(np.float32) / 255
    normalised = (values - np.array(processing.mean, np.float32)) / np.array(processing.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))
