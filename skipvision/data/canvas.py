"""A picture in the making: finds room for things, pastes them, remembers which pixel is whose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from skipvision.data.backgrounds import SIDE
from skipvision.data.names import COLOUR_IDS, LABEL_IDS, LABELS

PATCH = 14
GRID = SIDE // PATCH
MIN_SHARE = 0.2  # of a patch that a thing must cover to give the patch its label
MAX_OVERLAP = 0.1  # of the smaller of two boxes
TRIES = 30

Box = tuple[int, int, int, int]
Category = Literal["object", "shape", "text"]


@dataclass(frozen=True)
class Item:
    """One thing in a picture; `box` is left, top, right, bottom in pixels, ends excluded."""

    name: str
    category: Category
    colour: str | None
    text: str | None
    box: Box
    style: str

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


class Canvas:
    """The background with what has been placed on it so far."""

    def __init__(self, background: Image.Image, frame: Box) -> None:
        self.image = background
        self.frame = frame
        self.items: list[Item] = []
        self._labels = np.zeros((SIDE, SIDE), np.int32)
        self._colours = np.zeros((SIDE, SIDE), np.int32)
        small = background.crop(frame).resize((6, 6), Image.Resampling.BOX)
        self.ground = np.asarray(small, np.float32).reshape(-1, 3)

    @property
    def room(self) -> tuple[int, int]:
        """Return the width and height that things may take."""
        return self.frame[2] - self.frame[0] - 4, self.frame[3] - self.frame[1] - 4

    def find_room(self, size: tuple[int, int], rng: np.random.Generator) -> Box | None:
        """Return a box of this size that hardly overlaps what is there, or None."""
        width, height = size
        if width > self.room[0] or height > self.room[1]:
            return None
        for _ in range(TRIES):
            x = self.frame[0] + 2 + int(rng.integers(self.room[0] - width + 1))
            y = self.frame[1] + 2 + int(rng.integers(self.room[1] - height + 1))
            box = (x, y, x + width, y + height)
            if all(overlap(box, item.box) <= _allowed(item) for item in self.items):
                return box
        return None

    def paste(self, image: Image.Image, item: Item, labels: NDArray[np.int32]) -> None:
        """Put the picture into the item's box; `labels` gives each of its pixels a class."""
        x0, y0, x1, y1 = item.box
        self.image.paste(image, (x0, y0), image)
        shown = labels > 0
        self._labels[y0:y1, x0:x1][shown] = labels[shown]
        self._colours[y0:y1, x0:x1][shown] = COLOUR_IDS[item.colour] if item.colour else 0
        self.items.append(item)

    def patch_maps(self) -> tuple[NDArray[np.int16], NDArray[np.int8], NDArray[np.float32]]:
        """Return each patch's label, its colour and the share of it that is covered."""
        labels = _most_common(self._labels, len(LABELS))
        colours = _most_common(self._colours, len(COLOUR_IDS) + 1)
        tiles = (self._labels > 0).reshape(GRID, PATCH, GRID, PATCH)
        cover = tiles.mean((1, 3), dtype=np.float32)
        return labels.astype(np.int16), colours.astype(np.int8), cover


def _allowed(item: Item) -> float:
    # A letter half hidden is another letter.
    return 0.0 if item.category == "text" else MAX_OVERLAP


def solid(image: Image.Image, name: str) -> NDArray[np.int32]:
    """Return the class of a named thing wherever the picture is opaque."""
    return np.where(np.asarray(image.getchannel("A")) > 100, LABEL_IDS[name], 0).astype(np.int32)


def overlap(first: Box, second: Box) -> float:
    """Return the shared area as a share of the smaller box."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return width * height / min(areas)


_PATCH_OF = (np.arange(SIDE) // PATCH)[:, None] * GRID + np.arange(SIDE) // PATCH


def _most_common(classes: NDArray[np.int32], num_classes: int) -> NDArray[np.int64]:
    present = np.flatnonzero(np.bincount(classes.ravel(), minlength=num_classes))
    compact = np.zeros(num_classes, np.int64)
    compact[present] = np.arange(len(present))
    cells = (_PATCH_OF * len(present) + compact[classes]).ravel()
    counts = np.bincount(cells, minlength=GRID * GRID * len(present))
    counts = counts.reshape(GRID, GRID, len(present))
    if present[0] == 0:
        # The background only wins where nothing else covers enough of the patch.
        counts[..., 0] = 0
    best = counts.argmax(-1)
    enough = counts.max(-1) >= MIN_SHARE * PATCH * PATCH
    return np.where(enough, present[best], 0)
