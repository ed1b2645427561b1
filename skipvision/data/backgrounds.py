"""Grounds to put things on: plain, graded, noisy, striped, blurred."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 224
Paint = Callable[[np.random.Generator], Image.Image]


def _rgb(rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a ground colour: mostly pale or dull, so that things stand out."""
    base = rng.uniform(0, 255, 3) if rng.random() < 0.3 else rng.uniform(120, 255, 3)
    gray = float(base.mean())
    return np.asarray(gray + (base - gray) * rng.uniform(0.1, 0.7), np.float32)


def _near(colour: NDArray[np.float32], spread: float, rng: np.random.Generator) -> NDArray[np.float32]:
    return np.clip(colour + rng.uniform(-spread, spread, 3), 0, 255).astype(np.float32)


def _tuple(colour: NDArray[np.float32]) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in colour)
    return red, green, blue


def _image(pixels: NDArray[np.float32]) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def plain(rng: np.random.Generator) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), _tuple(_rgb(rng)))


def gradient(rng: np.random.Generator) -> Image.Image:
    first = _rgb(rng)
    second = _near(first, 90, rng)
    angle = rng.uniform(0, 2 * np.pi)
    line = np.linspace(-0.5, 0.5, 32, dtype=np.float32)
    slope = np.clip(0.5 + np.cos(angle) * line[None, :] + np.sin(angle) * line[:, None], 0, 1)
    small = first + (second - first) * slope[..., None].astype(np.float32)
    return _image(small).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def noise(rng: np.random.Generator) -> Image.Image:
    grain = rng.normal(0, rng.uniform(5, 22), (SIDE, SIDE, 1)).astype(np.float32)
    return _image(_rgb(rng) + grain)


def stripes(rng: np.random.Generator) -> Image.Image:
    first = _rgb(rng)
    second = _near(first, 40, rng)
    image = Image.new("RGB", (SIDE, SIDE), _tuple(first))
    draw = ImageDraw.Draw(image)
    step = int(rng.integers(8, 40))
    for start in range(0, SIDE, 2 * step):
        draw.rectangle((start, 0, start + step - 1, SIDE), fill=_tuple(second))
    return image.rotate(90) if rng.random() < 0.5 else image


def checker(rng: np.random.Generator) -> Image.Image:
    first = _rgb(rng)
    second = _near(first, 30, rng)
    cells = int(rng.integers(4, 12))
    board = (np.indices((cells, cells)).sum(0) % 2)[..., None].astype(np.float32)
    return _image(first + (second - first) * board).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def blobs(rng: np.random.Generator) -> Image.Image:
    """Return soft patches of related colours, as of a scene far out of focus."""
    cells = int(rng.integers(3, 8))
    colour = _rgb(rng)
    small = colour + rng.uniform(-45, 45, (cells, cells, 3)).astype(np.float32)
    return _image(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def texture(rng: np.random.Generator) -> Image.Image:
    cells = int(rng.integers(24, 90))
    small = _rgb(rng) + rng.normal(0, rng.uniform(4, 13), (cells, cells, 1)).astype(np.float32)
    return _image(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def horizon(rng: np.random.Generator) -> Image.Image:
    top, bottom = _rgb(rng), _rgb(rng)
    if rng.random() < 0.5:
        top = np.array([rng.uniform(130, 210), rng.uniform(190, 230), 250], dtype=np.float32)
        bottom = np.array([rng.uniform(90, 200), rng.uniform(150, 200), rng.uniform(80, 130)], dtype=np.float32)
    image = Image.new("RGB", (SIDE, SIDE), _tuple(top))
    height = int(rng.uniform(0.4, 0.8) * SIDE)
    ImageDraw.Draw(image).rectangle((0, height, SIDE, SIDE), fill=_tuple(bottom))
    return image


_PAINTS: tuple[Paint, ...] = (plain, gradient, noise, stripes, checker, blobs, texture, horizon)
_SHARES = (0.2, 0.16, 0.1, 0.08, 0.06, 0.16, 0.12, 0.12)


def paint_background(rng: np.random.Generator) -> Image.Image:
    """Return a random ground of SIDE x SIDE."""
    return _PAINTS[int(rng.choice(len(_PAINTS), p=_SHARES))](rng)
