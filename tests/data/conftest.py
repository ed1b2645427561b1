"""A tiny world of made-up art, so that nothing here needs a download."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from skipvision.data.assets import Assets, CutOut, FontFace, Style
from skipvision.data.kinds import KINDS

STYLES: tuple[Style, ...] = ("photo", "noto", "twemoji", "openmoji")


@pytest.fixture(scope="session")
def assets() -> Assets:
    rng = np.random.default_rng(7)
    cutouts = [
        CutOut(kind.name, style, f"{style}-{kind.name}", False, blob(rng)) for kind in KINDS[:30] for style in STYLES
    ]
    cutouts += [CutOut(kind.name, "photo", f"spare-{kind.name}", True, blob(rng)) for kind in KINDS[:12]]
    fonts = (FontFace("Known", None), FontFace("Unseen", None, held_out=True))
    return Assets(tuple(cutouts), fonts, ("stop", "open", "bread", "garden"), ("exit", "ocean"))


def blob(rng: np.random.Generator) -> Image.Image:
    """Return an opaque ellipse on nothing."""
    height, width = (int(side) for side in rng.integers(40, 129, 2))
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    pixels = np.empty((height, width, 4), np.uint8)
    pixels[..., :3] = rng.integers(0, 256, 3)
    pixels[..., 3] = 255 * (x * x + y * y <= 1)
    return Image.fromarray(pixels)
