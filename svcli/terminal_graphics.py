"""A picture in the escape sequences of terminals that can draw: Kitty's protocol, iTerm2's, and Sixel.

What comes out is ASCII, of the picture's pixels alone: no name or text of anybody's is in it.
"""

from __future__ import annotations

import base64
import io
import re
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

_PIECE = 4096
"""Letters that Kitty takes at a time."""
MOST_COLOURS = 256
"""That a picture in Sixel has."""
_BAND = 6
_RUNS = re.compile(r"(.)\1{3,}")


def kitty(image: Image.Image, columns: int) -> str:
    """RGB, scaled to so many columns. Kitty's graphics protocol: a PNG in pieces, and no answer (q=2)."""
    data = base64.b64encode(_png(image)).decode("ascii")
    pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
    first = f"a=T,f=100,q=2,c={columns},"
    return "".join(
        f"\x1b_G{'' if index else first}m={int(index < len(pieces) - 1)};{piece}\x1b\\"
        for index, piece in enumerate(pieces)
    )


def iterm2(image: Image.Image, columns: int, lines: int) -> str:
    """RGB, as large as fits so many columns and lines. iTerm2's inline images, which others know too."""
    data = _png(image)
    where = f"size={len(data)};width={columns};height={lines};preserveAspectRatio=1;inline=1"
    return f"\x1b]1337;File={where}:{base64.b64encode(data).decode('ascii')}\x07"


def sixel(image: Image.Image, num_colours: int = MOST_COLOURS) -> str:
    """RGB, pixel for pixel, in so many colours: bands of six lines, each drawn colour by colour."""
    reduced = image.quantize(min(num_colours, MOST_COLOURS))
    indices = np.asarray(reduced)
    used = np.unique(indices).tolist()
    palette = np.array(reduced.getpalette(), np.int64).reshape(-1, 3)
    percent = (palette * 100 + 127) // 255
    colours = "".join("#{};2;{};{};{}".format(each, *percent[each]) for each in used)
    bands = [_band(indices[top : top + _BAND]) for top in range(0, image.height, _BAND)]
    return f'\x1bPq"1;1;{image.width};{image.height}{colours}{"-".join(bands)}\x1b\\'


def _band(indices: npt.NDArray[np.uint8]) -> str:
    """[up to 6, width] of colours; `$` goes back to the left."""
    bits = (1 << np.arange(len(indices)))[:, None]
    layers = []
    for colour in np.unique(indices).tolist():
        letters = (((indices == colour) * bits).sum(0) + ord("?")).astype(np.uint8).tobytes().decode("ascii")
        runs = _RUNS.sub(lambda match: f"!{len(match[0])}{match[1]}", letters.rstrip("?"))
        layers.append(f"#{colour}{runs}")
    return "$".join(layers)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
