"""Pictures as the encoder takes them, and their visual rows, which are computed once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from skipvision.tiles import Cut
from svcli_engines.base import Pixels, Visual

_DEFAULT_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of a conversation."""

    image: Image.Image
    cut: Cut
    views: Pixels
    """[I, 3, S, S]."""
    key: str
    """The same for what looks the same to the encoder."""

    @staticmethod
    def of(image: Image.Image, cut: Cut, views: Pixels) -> Picture:
        digest = hashlib.blake2b(repr(cut).encode(), digest_size=16)
        digest.update(views.tobytes())
        return Picture(image, cut, views, digest.hexdigest())


class VisualCache:
    """Visual rows by picture, as many as fit; those that were not asked for the longest go first."""

    def __init__(self, max_bytes: int = _DEFAULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = self.num_hits = self.num_misses = 0
        self._rows: OrderedDict[str, Visual] = OrderedDict()

    def rows(self, picture: Picture, encode: Callable[[Pixels, Cut], Visual]) -> Visual:
        """What `encode` makes of the picture, or made of it before."""
        if picture.key in self._rows:
            self._rows.move_to_end(picture.key)
            self.num_hits += 1
            return self._rows[picture.key]
        self.num_misses += 1
        visual = encode(picture.views, picture.cut)
        self._rows[picture.key] = visual
        self.num_bytes += visual.num_bytes
        while self.num_bytes > self.max_bytes and self._rows:
            self.num_bytes -= self._rows.popitem(last=False)[1].num_bytes
        return visual
