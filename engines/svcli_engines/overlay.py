"""Which parts of a picture the model retained: where tokens lie in it, and a drawing of them. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from skipvision.config import ModelConfig
from skipvision.layout import Ints
from skipvision.tiles import Cut, mosaic, scaled_sizes
from svcli_export.manifest import ImageProcessing

SMALLEST, LARGEST = 448, 1600
"""Pixels of the longer side of a drawing: lines can be seen on a thumbnail, and a photo is drawn at once."""
_INNER, _OUTER = (255, 176, 0), (0, 0, 0)
"""A bright line in a dark one can be seen on every ground, in print, and by whoever cannot tell hues apart."""
_VEIL, _GREY = 0.4, 235
"""What is not retained is grey, this share of its contrast under a light veil."""


class OverlayError(ValueError):
    """A picture on which nothing can be marked; one sentence that says why."""


@dataclass(frozen=True)
class Box:
    """A part of a picture, in shares of its width and height from 0 to 1, upright."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class _Scale:
    """Where one side of a picture lies in a view: pixel p at p * factor + offset."""

    factor: float
    offset: float

    def back(self, start: float, length: float, num_pixels: int) -> tuple[float, float]:
        """The share of the picture's `num_pixels` that lies at [start, start + length] of the view; within 0 to 1."""
        ends = ((place - self.offset) / self.factor / num_pixels for place in (start, start + length))
        first, last = (min(max(end, 0.0), 1.0) for end in ends)
        return first, last


_View = tuple[_Scale, _Scale]
"""Along the width, along the height."""


def retained_boxes(
    retained: Ints | None, config: ModelConfig, processing: ImageProcessing, cut: Cut
) -> tuple[Box, ...]:
    """What the model retained of one picture, each patch a box; boxes of a thumbnail lie over those of tiles.

    `retained` [I, R] is what the engine says of that picture alone: of each of its views, or, where views are joined or
    there is one, I = 1. Padding is no part of the picture, and left out.

    Raises OverlayError where nothing was selected, the engine cannot tell, or tokens are no patches.
    """
    if retained is None:
        raise OverlayError("nothing is marked: the model selects no patches, or this engine does not say which")
    if config.resampler is not None:
        raise OverlayError("nothing is marked: the tokens of a resampler are no patches of the picture")
    views = _views(config, processing, cut)
    line = config.vision.grid // config.pixel_shuffle
    side = config.vision.patch_size * config.pixel_shuffle
    boxes = []
    for view, token in _places(retained, config, cut):
        across, down = views[view]
        left, right = across.back(token % line * side, side, cut.width)
        top, bottom = down.back(token // line * side, side, cut.height)
        if left < right and top < bottom:
            boxes.append(Box(left, top, right, bottom))
    return tuple(boxes)


def mark_retained(
    image: Image.Image, retained: Ints | None, config: ModelConfig, processing: ImageProcessing, cut: Cut
) -> Image.Image:
    """The upright RGB picture with what the model retained as it is, in an outline, and all else grey and faint.

    Its longer side is brought between SMALLEST and LARGEST pixels. Arguments and errors are those of `retained_boxes`.
    """
    boxes = retained_boxes(retained, config, processing, cut)
    longest = max(image.size)
    scale = min(max(longest, SMALLEST), LARGEST) / longest
    width, height = (max(1, round(length * scale)) for length in image.size)
    clear = image.resize((width, height), Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    mask = np.zeros((height, width), np.uint8)
    for box in boxes:
        left, right = _pixels(box.left, box.right, width)
        top, bottom = _pixels(box.top, box.bottom, height)
        mask[top:bottom, left:right] = 255
    shown = Image.fromarray(mask)
    faint = Image.blend(Image.new("L", clear.size, _GREY), ImageOps.grayscale(clear), _VEIL).convert("RGB")
    marked = Image.composite(clear, faint, shown)
    thickness = max(1, round(max(width, height) / 250))
    marked.paste(_OUTER, mask=_rim(shown, 2 * thickness))
    marked.paste(_INNER, mask=_rim(shown, thickness))
    return marked


def _pixels(start: float, end: float, length: int) -> tuple[int, int]:
    first = min(round(start * length), length - 1)
    return first, max(round(end * length), first + 1)


def _rim(mask: Image.Image, thickness: int) -> Image.Image:
    """The part of `mask` that is so near to its edge, the picture's edge included."""
    # A mean is full where all around is; it takes as long for any thickness, which a minimum does not.
    mean = ImageOps.crop(ImageOps.expand(mask, thickness).filter(ImageFilter.BoxBlur(thickness)), thickness)
    return Image.composite(Image.new("L", mask.size, 0), mask, mean.point([0] * 255 + [255]))


def _places(retained: Ints, config: ModelConfig, cut: Cut) -> Iterator[tuple[int, int]]:
    """View and token of that view, of whatever was retained."""
    if config.tiles is None or not config.tiles.is_joined:
        for view, tokens in enumerate(retained.tolist()):
            yield from ((view, token) for token in tokens)
        return
    pieces = mosaic(config, cut)
    index, weight = (part[:, retained[0]] for part in (pieces.index, pieces.weight))
    # Of a mosaic that is shrunk, the patches that a token is made of, but for those that hardly count.
    counts = (weight >= weight.max(0) / 2) & (index < config.num_tokens * cut.num_views)
    for row in sorted(set(index[counts].tolist())):
        yield divmod(row, config.num_tokens)


def _views(config: ModelConfig, processing: ImageProcessing, cut: Cut) -> list[_View]:
    """Where the picture lies in each of its views, in the order of the pixels that the model is given."""
    side, tiles = processing.image_size, config.tiles
    if tiles is None or (tiles.is_joined and not cut.rows):
        return [_square(processing, cut)]
    thumbnail = _Scale(side / cut.width, 0), _Scale(side / cut.height, 0)
    if not tiles.is_joined:
        high, wide = scaled_sizes(tiles.longest_edge, side, cut.height, cut.width)[1]
        return [*_tiles(side, cut, _Scale(wide / cut.width, 0), _Scale(high / cut.height, 0)), thumbnail]
    wide, high = cut.columns * side, cut.rows * side
    across, down = wide / cut.width, high / cut.height
    if across < down:
        high = min(math.ceil(cut.height * across), high)
    else:
        wide = min(math.ceil(cut.width * down), wide)
    centred = _centred(cut.width, wide, cut.columns * side), _centred(cut.height, high, cut.rows * side)
    return [thumbnail, *_tiles(side, cut, *centred)]


def _tiles(side: int, cut: Cut, across: _Scale, down: _Scale) -> Iterator[_View]:
    for row in range(cut.rows):
        for column in range(cut.columns):
            yield (
                _Scale(across.factor, across.offset - column * side),
                _Scale(down.factor, down.offset - row * side),
            )


def _square(processing: ImageProcessing, cut: Cut) -> _View:
    """Of a picture that is seen once."""
    side, lengths = processing.image_size, (cut.width, cut.height)
    longest, shortest = max(lengths), min(lengths)
    if processing.fit == "stretch":
        across, down = (_Scale(side / length, 0) for length in lengths)
    elif processing.fit == "crop":
        scaled = (side if length == shortest else int(side * length / shortest) for length in lengths)
        across, down = (_centred(length, size, side) for length, size in zip(lengths, scaled, strict=True))
    elif processing.fit == "pad_first":
        scale = side / longest
        across, down = (_Scale(scale, (longest - length) // 2 * scale) for length in lengths)
    else:
        scaled = (max(1, round(length * side / longest)) for length in lengths)
        across, down = (_centred(length, size, side) for length, size in zip(lengths, scaled, strict=True))
    return across, down


def _centred(length: int, scaled: int, room: int) -> _Scale:
    """Resized to `scaled` pixels in the middle of `room`, or `room` in the middle of them."""
    offset = (room - scaled) // 2 if scaled <= room else -((scaled - room) // 2)
    return _Scale(scaled / length, offset)
