"""Which combinations training never sees."""

from __future__ import annotations

from typing import Literal
from zlib import crc32

Split = Literal["train", "val", "test", "test_style", "test_font", "test_photo"]
SPLITS: tuple[Split, ...] = ("train", "val", "test", "test_style", "test_font", "test_photo")


def _tenth(text: str) -> bool:
    return crc32(text.encode()) % 10 == 0


def pair_is_held_out(first: str, second: str) -> bool:
    """Whether these two things never stand together in a training picture."""
    return first != second and _tenth("+".join(sorted((first, second))))


def colour_is_held_out(colour: str, shape: str) -> bool:
    """Whether no training picture shows this shape in this colour."""
    return _tenth(f"{colour} {shape} 2")
