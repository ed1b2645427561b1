"""Pictures as people name them, and what was opened of them."""

from __future__ import annotations

import base64
import glob
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svcli.answer_options import PRIVATE_REMEDY

if TYPE_CHECKING:
    from PIL import Image

    from skipvision.config import Transparency

STDIN = "-"
_URL = re.compile(r"(https?|data|file):", re.IGNORECASE)
_ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class Picture:
    """One picture of a conversation."""

    name: str
    """What messages call it."""
    where: Path | str | None
    """A file or a URL; None for what came once and cannot be read again."""
    image: Image.Image
    """RGB, upright."""
    notes: tuple[str, ...] = ()

    @property
    def short_name(self) -> str:
        """Short enough for one line."""
        return self.name.rstrip("/").rsplit("/", 1)[-1] or self.name

    @property
    def reference(self) -> str:
        """What it can be opened from another day: an absolute path, a URL, or the picture itself as one."""
        if isinstance(self.where, Path):
            return os.path.abspath(self.where)
        if self.where is not None:
            return self.where
        file = io.BytesIO()
        self.image.save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def is_picture(word: str) -> bool:
    """Whether an argument stands for a picture: there is such a file, or it cannot be meant as a question."""
    if word == STDIN or _URL.match(word):
        return True
    # os.path and not pathlib, which raises where a question is longer than a file name can be.
    path = os.path.expanduser(word)
    if os.path.isfile(path) or (not any(map(str.isspace, word)) and word.lower().endswith(_ENDINGS)):
        return True
    return glob.has_magic(path) and "\0" not in path and any(map(os.path.isfile, glob.iglob(path)))


def open_pictures(words: Sequence[str], transparency: Transparency, *, allow_private: bool = False) -> list[Picture]:
    """All pictures that the words stand for: paths, patterns, URLs, STDIN. `allow_private`: URLs may lead to addresses
    that are not public.

    Raises ImageError.
    """
    from svcli_engines.picture_sources import find_pictures
    from svcli_engines.picture_urls import FetchLimits

    limits, found = FetchLimits(allow_private=allow_private, private_remedy=PRIVATE_REMEDY), []
    for word in words:
        for source in find_pictures(word):
            loaded = source.open(transparency, limits)
            where = None if isinstance(source.where, bytes) else source.where
            found.append(Picture(source.name, where, loaded.image, loaded.notes))
    return found
