"""Plain geometric shapes and the colours they come in."""

from __future__ import annotations

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]

# Hue in degrees, saturation and value ranges; gaps between them keep the names unambiguous.
_RANGES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-5, 5), (0.82, 1), (0.72, 0.95)),
    "orange": ((25, 33), (0.9, 1), (0.95, 1)),
    "yellow": ((51, 58), (0.8, 1), (0.93, 1)),
    "green": ((100, 145), (0.65, 1), (0.42, 0.8)),
    "blue": ((212, 235), (0.7, 1), (0.6, 0.95)),
    "purple": ((270, 287), (0.6, 0.9), (0.45, 0.72)),
    "pink": ((325, 342), (0.3, 0.55), (0.96, 1)),
    "brown": ((20, 28), (0.6, 0.8), (0.32, 0.48)),
    "black": ((0, 360), (0, 0.2), (0, 0.1)),
    "white": ((0, 360), (0, 0.03), (0.96, 1)),
    "gray": ((0, 360), (0, 0.05), (0.46, 0.62)),
}


def sample_rgb(colour: str, rng: np.random.Generator) -> Rgb:
    """Return one of the shades that the colour's name covers."""
    hue, saturation, value = (rng.uniform(*span) for span in _RANGES[colour])
    red, green, blue = colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _regular(corners: int, turn: float) -> list[tuple[float, float]]:
    angles = (math.tau * i / corners + turn for i in range(corners))
    return [(0.5 + 0.5 * math.sin(a), 0.5 - 0.5 * math.cos(a)) for a in angles]


def _star() -> list[tuple[float, float]]:
    points = []
    for i in range(10):
        angle, radius = math.tau * i / 10, 0.5 if i % 2 == 0 else 0.21
        points.append((0.5 + radius * math.sin(angle), 0.5 - radius * math.cos(angle)))
    return points


def _heart() -> list[tuple[float, float]]:
    points = []
    for i in range(40):
        t = math.tau * i / 40
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((0.5 + x / 34, 0.46 - y / 34))
    return points


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)],
    "triangle": [(0.5, 0.04), (1, 0.94), (0, 0.94)],
    "rectangle": [(0, 0.24), (1, 0.24), (1, 0.76), (0, 0.76)],
    "star": _star(),
    "heart": _heart(),
    "hexagon": _regular(6, math.tau / 12),
    "diamond": [(0.5, 0), (0.84, 0.5), (0.5, 1), (0.16, 0.5)],
    "cross": [
        *((0.34, 0.0), (0.66, 0.0), (0.66, 0.34), (1.0, 0.34), (1.0, 0.66), (0.66, 0.66)),
        *((0.66, 1.0), (0.34, 1.0), (0.34, 0.66), (0.0, 0.66), (0.0, 0.34), (0.34, 0.34)),
    ],
}
# A turned square is a diamond, a turned cross an X: only shapes that keep their name turn far.
_TURNS: dict[str, float] = {"star": 180, "hexagon": 180, "triangle": 25, "heart": 25}


def draw_shape(shape: str, size: int, rgb: Rgb, outline: Rgb | None, rng: np.random.Generator) -> Image.Image:
    """Return the shape on a transparent ground, its longest side about `size`."""
    scale = 2
    side = size * scale
    image = Image.new("RGBA", (side, side), (*rgb, 0))
    draw = ImageDraw.Draw(image)
    line = max(2, side // 28) if outline is not None else 0
    if shape in ("circle", "oval"):
        inset = 0.0 if shape == "circle" else side * rng.uniform(0.18, 0.25)
        box = (0.0, inset, side - 1.0, side - 1.0 - inset)
        draw.ellipse(box, fill=rgb, outline=outline, width=line)
    else:
        points = [(x * (side - 1), y * (side - 1)) for x, y in _POLYGONS[shape]]
        draw.polygon(points, fill=rgb)
        if outline is not None:
            draw.line([*points, points[0], points[1]], fill=outline, width=line, joint="curve")
    image = image.resize((size, size), Image.Resampling.BOX)
    if shape == "circle":
        return image
    if shape in ("rectangle", "oval") and rng.random() < 0.35:
        image = image.rotate(90)
    limit = _TURNS.get(shape, 10)
    turned = image.rotate(rng.uniform(-limit, limit), Image.Resampling.BILINEAR, expand=True)
    return turned.crop(turned.getchannel("A").getbbox())
