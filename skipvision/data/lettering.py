"""Words and numbers drawn as pictures, with the place of each glyph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from skipvision.data.assets import Assets, FontFace
from skipvision.data.shapes import Rgb
from skipvision.data.split import Split

# Alike in many faces, so that a string without meaning must not use them.
_CLEAR_LETTERS = tuple("ABCDEFGHJKMNPQRSTUVWXYZ")
MIN_CAP_HEIGHT, MAX_CAP_HEIGHT = 22, 70


@dataclass(frozen=True)
class Lettering:
    """Text on a transparent ground; `glyphs` gives 1 + the character's index where it stands."""

    image: Image.Image
    glyphs: NDArray[np.uint8]


def sample_text(assets: Assets, split: Split, rng: np.random.Generator) -> str:
    """Return a word in one of three cases, a number or a string without meaning."""
    dice = rng.random()
    if dice < 0.25:
        length = int(rng.integers(1, 6))
        return str(int(rng.integers(10 ** (length - 1) if length > 1 else 0, 10**length)))
    if dice < 0.42:
        text = "".join(rng.choice(_CLEAR_LETTERS, int(rng.integers(2, 6))))
        return text if rng.random() < 0.75 else text.lower()
    words = assets.words_for(split)
    word = words[int(rng.integers(len(words)))]
    case = rng.random()
    return word.upper() if case < 0.5 else word.title() if case < 0.7 else word


@lru_cache(maxsize=1024)
def _font(path: str | None, size: int) -> ImageFont.FreeTypeFont:
    if path is not None:
        return ImageFont.truetype(path, size)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def draw_text(
    text: str,
    face: FontFace,
    cap_height: int,
    max_width: int,
    rgb: Rgb,
    plate: Rgb | None,
    angle: float,
) -> Lettering:
    """Draw the text turned by `angle` degrees, on a plate if it is given a colour."""
    size = round(cap_height / 0.7)
    width = _font(face.path, size).getlength(text)
    if width > max_width:
        size = max(round(size * max_width / width), 12)
    font = _font(face.path, size)
    left, top, right, bottom = font.getbbox(text)
    pad = max(3, size // 4) if plate is not None else 1
    box = (int(right - left) + 2 * pad, int(bottom - top) + 2 * pad)
    image = Image.new("RGBA", box, (*rgb, 0))
    draw = ImageDraw.Draw(image)
    if plate is not None:
        draw.rounded_rectangle((0, 0, box[0] - 1, box[1] - 1), pad, fill=plate)
    draw.text((pad - left, pad - top), text, fill=rgb, font=font)

    glyphs = Image.new("L", box, 0)
    slots = ImageDraw.Draw(glyphs)
    for i, character in enumerate(text):
        x = font.getlength(text[:i]) + pad - left
        ink = font.getbbox(character)
        slots.rectangle((x + ink[0], pad - top + ink[1], x + ink[2], pad - top + ink[3]), fill=i + 1)
    if angle:
        image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        glyphs = glyphs.rotate(angle, Image.Resampling.NEAREST, expand=True)
    return Lettering(image, np.asarray(glyphs))
