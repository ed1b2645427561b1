"""The kinds of picture there are, and filling a canvas with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from skipvision.data.assets import Assets
from skipvision.data.canvas import Canvas, Item, solid
from skipvision.data.lettering import MAX_CAP_HEIGHT, MIN_CAP_HEIGHT, draw_text, sample_text
from skipvision.data.names import COLOURS, LABEL_IDS, SHAPES
from skipvision.data.shapes import Rgb, draw_shape, sample_rgb
from skipvision.data.split import Split, colour_is_held_out, pair_is_held_out

# The distance in RGB below which a colour is hard to tell from the ground.
VISIBLE = 70.0
# The same for things of several colours, which stand out by their drawing as well.
FAINT = 30.0


def mean_rgb(image: Image.Image) -> Rgb:
    """Return the mean colour of what is opaque."""
    pixels = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR), np.float32).reshape(-1, 4)
    weights = pixels[:, 3] + 1e-3
    red, green, blue = (pixels[:, :3] * weights[:, None]).sum(0) / weights.sum()
    return round(float(red)), round(float(green)), round(float(blue))


def luminance(rgb: Rgb | NDArray[np.float32]) -> Any:
    """Return the perceived brightness of a colour or of a list of colours, 0 to 255."""
    return np.asarray(rgb, np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


class Composer:
    """Puts things of one split on one canvas."""

    def __init__(self, canvas: Canvas, assets: Assets, split: Split, rng: np.random.Generator) -> None:
        self.canvas = canvas
        self.assets = assets
        self.split = split
        self.rng = rng
        self.cutouts = assets.cutouts_for(split)
        self.kinds = tuple(self.cutouts)

    def one_big(self) -> None:
        size = self.rng.integers(60, 201)
        if self.rng.random() < 0.78:
            self.add_object(self.pick_kind(), int(size))
        else:
            self.add_shape(self.pick_shape(), None, int(size))

    def several(self) -> None:
        for _ in range(int(self.rng.integers(2, 5))):
            size = int(self.rng.integers(44, 105))
            if self.rng.random() < 0.7:
                self.add_object(self.pick_kind(), size)
            else:
                self.add_shape(self.pick_shape(), None, size)

    def many_equal(self) -> None:
        """Two to six of one thing, and up to two others."""
        num_equal = int(self.rng.integers(2, 7))
        size = int(self.rng.integers(36, 56 + 60 // (num_equal + 1)))
        if self.rng.random() < 0.6:
            kind = self.pick_kind()
            same = self.rng.random() < 0.5
            choices = self.cutouts[kind]
            which = int(self.rng.integers(len(choices)))
            for _ in range(num_equal):
                self.add_object(kind, self.vary(size), which if same else None)
        else:
            shape = self.pick_shape()
            colour = self.pick_colour(shape) if self.rng.random() < 0.6 else None
            for _ in range(num_equal):
                self.add_shape(shape, colour, self.vary(size))
        taken = {item.name for item in self.canvas.items}
        for _ in range(int(self.rng.integers(0, 3))):
            other = self.pick_shape()
            if self.rng.random() < 0.5:
                self.add_object(self.pick_kind(), self.vary(size))
            elif other not in taken or num_equal < 5:
                self.add_shape(other, None, self.vary(size))

    def coloured_shapes(self) -> None:
        for _ in range(int(self.rng.integers(2, 6))):
            self.add_shape(self.pick_shape(), None, int(self.rng.integers(36, 90)))

    def lettered(self) -> None:
        """A word or number, alone or with one thing."""
        if self.rng.random() < 0.6:
            self.add_text(MIN_CAP_HEIGHT, MAX_CAP_HEIGHT)
            return
        self.add_text(MIN_CAP_HEIGHT, 50)
        size = int(self.rng.integers(50, 110))
        if self.rng.random() < 0.65:
            self.add_object(self.pick_kind(), size)
        else:
            self.add_shape(self.pick_shape(), None, size)

    def mixed(self) -> None:
        self.add_text(MIN_CAP_HEIGHT, 40)
        self.add_object(self.pick_kind(), int(self.rng.integers(44, 90)))
        self.add_shape(self.pick_shape(), None, int(self.rng.integers(36, 80)))

    def vary(self, size: int) -> int:
        return max(32, round(size * self.rng.uniform(0.8, 1.2)))

    def pick_kind(self) -> str:
        """Return a kind that may stand beside what is there and is not there yet."""
        taken = {item.name for item in self.canvas.items if item.category == "object"}
        for _ in range(20):
            kind = self.kinds[int(self.rng.integers(len(self.kinds)))]
            held_out = self.split == "train" and any(pair_is_held_out(kind, t) for t in taken)
            if not held_out and kind not in taken:
                return kind
        return min(taken, default=self.kinds[0])

    def pick_shape(self) -> str:
        return SHAPES[int(self.rng.integers(len(SHAPES)))]

    def contrast(self, rgb: Rgb) -> float:
        """Return the distance to the ground where it is most alike."""
        gaps = np.linalg.norm(self.canvas.ground - np.array(rgb, np.float32), axis=1)
        return float(gaps.min())

    def pick_colour(self, shape: str | None) -> str:
        """Return a colour, for a shape one that this split may show it in."""
        for _ in range(40):
            colour = COLOURS[int(self.rng.integers(len(COLOURS)))]
            if shape is None or self.split != "train" or not colour_is_held_out(colour, shape):
                break
        return colour

    def add_object(self, kind: str, size: int, which: int | None = None) -> None:
        rng = self.rng
        choices = self.cutouts[kind]
        for _ in range(3):
            cutout = choices[int(rng.integers(len(choices))) if which is None else which]
            image = cutout.image
            if self.contrast(mean_rgb(image)) > FAINT:
                break
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scale = size / max(image.size)
        shape = (max(8, round(image.width * scale)), max(8, round(image.height * scale)))
        image = image.resize(shape, Image.Resampling.BILINEAR)
        if rng.random() < 0.6:
            image = image.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR, expand=True)
            image = image.crop(image.getchannel("A").getbbox())
        if rng.random() < 0.5:
            image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.75, 1.25))
        image = self.fitted(image)
        box = self.canvas.find_room(image.size, rng)
        if box is not None:
            item = Item(kind, "object", None, None, box, cutout.style)
            self.canvas.paste(image, item, solid(image, kind))

    def add_shape(self, shape: str, colour: str | None, size: int) -> None:
        rng = self.rng
        colour = colour or self.pick_colour(shape)
        rgb = max((sample_rgb(colour, rng) for _ in range(3)), key=self.contrast)
        outline: Rgb | None = None
        if self.contrast(rgb) < VISIBLE or rng.random() < 0.12:
            outline = (20, 20, 20) if luminance(rgb) > 110 else (240, 240, 240)
        image = self.fitted(draw_shape(shape, size, rgb, outline, rng))
        box = self.canvas.find_room(image.size, rng)
        if box is not None:
            item = Item(shape, "shape", colour, None, box, "shape")
            self.canvas.paste(image, item, solid(image, shape))

    def add_text(self, low: int, high: int) -> None:
        rng = self.rng
        text = sample_text(self.assets, self.split, rng)
        fonts = self.assets.fonts_for(self.split)
        face = fonts[int(rng.integers(len(fonts)))]
        height = round(float(np.exp(rng.uniform(np.log(low), np.log(high)))))
        colour = self.pick_colour(None)
        rgb = max((sample_rgb(colour, rng) for _ in range(3)), key=self.contrast)
        plate = self.pick_plate(rgb)
        angle = rng.uniform(-12, 12) if rng.random() < 0.6 else 0.0
        for shrink in (1.0, 0.75, 0.5):
            cap_height = max(16, round(height * shrink))
            width = self.canvas.room[0] - 24
            lettering = draw_text(text, face, cap_height, width, rgb, plate, angle * shrink)
            box = self.canvas.find_room(lettering.image.size, rng)
            if box is not None:
                name = "number" if text.isdigit() else "word"
                ids = np.array([0, *(LABEL_IDS[c.upper()] for c in text)], np.int32)
                item = Item(name, "text", colour, text, box, face.family)
                self.canvas.paste(lettering.image, item, ids[lettering.glyphs])
                return

    def pick_plate(self, rgb: Rgb) -> Rgb | None:
        """Return a ground for text of this colour: always where the picture hides it."""
        rng = self.rng
        gap = np.abs(luminance(self.canvas.ground) - luminance(rgb)).min()
        if gap > 55 and self.contrast(rgb) > 90 and rng.random() < 0.75:
            return None
        for _ in range(10):
            plate = sample_rgb(COLOURS[int(rng.integers(len(COLOURS)))], rng)
            if abs(luminance(plate) - luminance(rgb)) > 75:
                return plate
        return (250, 250, 250) if luminance(rgb) < 128 else (20, 20, 20)

    def fitted(self, image: Image.Image) -> Image.Image:
        """Return the picture, made smaller if it does not fit the canvas."""
        width, height = self.canvas.room
        if image.width <= width and image.height <= height:
            return image
        scale = min(width / image.width, height / image.height)
        size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
        return image.resize(size, Image.Resampling.BILINEAR)


def compose(canvas: Canvas, assets: Assets, split: Split, rng: np.random.Generator) -> None:
    """Fill the canvas with a random picture of the split; there is always something on it."""
    composer = Composer(canvas, assets, split, rng)
    plans: tuple[tuple[Callable[[], None], float], ...] = (
        (composer.one_big, 0.14),
        (composer.several, 0.2),
        (composer.many_equal, 0.22),
        (composer.coloured_shapes, 0.08),
        (composer.lettered, 0.26),
        (composer.mixed, 0.1),
    )
    if split == "test_font":
        plans = ((composer.lettered, 0.7), (composer.mixed, 0.3))
    shares = np.array([share for _, share in plans])
    while not canvas.items:
        plans[int(rng.choice(len(plans), p=shares / shares.sum()))][0]()
