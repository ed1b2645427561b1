"""Pictures composed from a seed: what is on them, where, and which patch shows what."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from skipvision.data.assets import Assets
from skipvision.data.backgrounds import paint_background
from skipvision.data.canvas import Canvas, Item
from skipvision.data.kinds import KINDS
from skipvision.data.plans import Composer, compose
from skipvision.data.split import SPLITS, Split

__all__ = ["Item", "Scene", "render", "render_shapes"]


@dataclass(frozen=True)
class Scene:
    """A 224x224 picture and the truth about it.

    `labels` holds an index into `LABELS` for each patch, `colours` one plus an index into
    `COLOURS` (0: none), `cover` the share of the patch that something covers. `kinds` are all
    kinds that pictures of this split may show: what a question about an absent thing may name.
    """

    image: Image.Image = field(repr=False)
    items: tuple[Item, ...]
    labels: NDArray[np.int16] = field(repr=False)
    colours: NDArray[np.int8] = field(repr=False)
    cover: NDArray[np.float32] = field(repr=False)
    kinds: tuple[str, ...] = field(repr=False)


def render(assets: Assets, seed: int, split: Split) -> Scene:
    """Return the picture that belongs to this seed and split, the same one each time."""
    rng = np.random.default_rng((SPLITS.index(split), seed))
    background = paint_background(rng)
    frame = _sample_frame(rng)
    canvas = Canvas(background, frame)
    compose(canvas, assets, split, rng)
    image = canvas.image
    _paint_borders(image, frame, rng)
    if rng.random() < 0.5:
        image = _recompressed(image, int(rng.integers(40, 96)))
    return _scene(canvas, image, tuple(assets.cutouts_for(split)))


def render_shapes(seed: int) -> Scene:
    """Return a picture of shapes alone, which needs no assets; the same one each time, and none of any split."""
    rng = np.random.default_rng((len(SPLITS), seed))
    canvas = Canvas(paint_background(rng), (0, 0, 224, 224))
    composer = Composer(canvas, Assets((), (), (), ()), "test", rng)
    while not canvas.items:
        composer.coloured_shapes()
    return _scene(canvas, canvas.image, tuple(kind.name for kind in KINDS))


def _scene(canvas: Canvas, image: Image.Image, kinds: tuple[str, ...]) -> Scene:
    labels, colours, cover = canvas.patch_maps()
    return Scene(image, tuple(canvas.items), labels, colours, cover, kinds)


def _sample_frame(rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return the part of the square that the picture fills, as of a wide or a tall photo."""
    if rng.random() < 0.8:
        return 0, 0, 224, 224
    border = int(rng.integers(14, 43))
    wide = rng.random() < 0.6
    return (0, border, 224, 224 - border) if wide else (border, 0, 224 - border, 224)


def _paint_borders(image: Image.Image, frame: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    x0, y0, x1, y1 = frame
    gray = int(rng.integers(100, 140))
    draw = ImageDraw.Draw(image)
    for box in ((0, 0, 224, y0), (0, y1, 224, 224), (0, 0, x0, 224), (x1, 0, 224, 224)):
        if box[2] > box[0] and box[3] > box[1]:
            draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(gray, gray, gray))


def _recompressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
