"""Art, fonts and words in the form that scenes are rendered from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from skipvision.data.errors import DataError
from skipvision.data.packages import fetch
from skipvision.data.prepare import CUTOUTS, CUTOUTS_INDEX, FONTS_INDEX, WORDS_INDEX, prepare
from skipvision.data.split import Split

__all__ = ["Assets", "CutOut", "FontFace", "Style", "fetch", "load", "prepare"]

Style = Literal["photo", "noto", "twemoji", "clipart", "openmoji"]
TEST_STYLE: Style = "openmoji"


@dataclass(frozen=True)
class CutOut:
    """One thing without background, cropped to its alpha box, RGBA."""

    kind: str
    style: Style
    source: str
    held_out: bool
    image: Image.Image = field(repr=False)


@dataclass(frozen=True)
class FontFace:
    """A font file; without a path, the one that Pillow carries."""

    family: str
    path: str | None
    held_out: bool = False


@dataclass(frozen=True)
class Assets:
    """All that a scene can be made of."""

    cutouts: tuple[CutOut, ...] = field(repr=False)
    fonts: tuple[FontFace, ...]
    words: tuple[str, ...] = field(repr=False)
    test_words: tuple[str, ...] = field(repr=False)

    @cached_property
    def _by_split(self) -> dict[Split, dict[str, tuple[CutOut, ...]]]:
        known = [c for c in self.cutouts if c.style != TEST_STYLE and not c.held_out]
        return {
            "train": _by_kind(known),
            "val": _by_kind(known),
            "test": _by_kind(known),
            "test_font": _by_kind(known),
            "test_style": _by_kind(c for c in self.cutouts if c.style == TEST_STYLE),
            "test_photo": _by_kind(c for c in self.cutouts if c.style == "photo" and c.held_out),
        }

    def cutouts_for(self, split: Split) -> dict[str, tuple[CutOut, ...]]:
        """Return the cut-outs that a split may draw, by kind."""
        return self._by_split[split]

    def fonts_for(self, split: Split) -> tuple[FontFace, ...]:
        return tuple(f for f in self.fonts if f.held_out == (split == "test_font"))

    def words_for(self, split: Split) -> tuple[str, ...]:
        return self.words if split in ("train", "val") else self.test_words


def _by_kind(cutouts: Iterable[CutOut]) -> dict[str, tuple[CutOut, ...]]:
    kinds: dict[str, list[CutOut]] = {}
    for cutout in cutouts:
        kinds.setdefault(cutout.kind, []).append(cutout)
    return {kind: tuple(kinds[kind]) for kind in sorted(kinds)}


def load(root: Path) -> Assets:
    """Read what `prepare` wrote into `root`."""
    if not (root / CUTOUTS_INDEX).exists():
        raise DataError(f"no prepared assets in {root}: fetch and prepare them first")
    rows = json.loads((root / CUTOUTS_INDEX).read_text(encoding="utf-8"))
    with np.load(root / CUTOUTS, allow_pickle=False) as arrays:
        pixels, sizes = arrays["pixels"], arrays["sizes"]
    ends = np.cumsum(sizes[:, 0].astype(np.int64) * sizes[:, 1] * 4)
    cutouts = tuple(
        CutOut(
            row["kind"],
            row["style"],
            row["source"],
            row["split"] == "test",
            Image.fromarray(pixels[end - h * w * 4 : end].reshape(h, w, 4)),
        )
        for row, end, (h, w) in zip(rows, ends.tolist(), sizes.tolist(), strict=True)
    )
    fonts = tuple(
        FontFace(row["family"], str(root / row["file"]), row["split"] == "test")
        for row in json.loads((root / FONTS_INDEX).read_text(encoding="utf-8"))
    )
    words = json.loads((root / WORDS_INDEX).read_text(encoding="utf-8"))
    return Assets(cutouts, fonts, tuple(words["train"]), tuple(words["test"]))
