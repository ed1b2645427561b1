"""Opening pictures that people have: bounded, forgiving about formats, clear about what cannot be read. No torch."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from skipvision.config import Transparency

MAX_PIXELS = 100_000_000
MAX_FILE_BYTES = 64 * 2**20
_ORIENTATION = 0x0112
_ACROSS = (5, 6, 7, 8)
"""Orientations whose height is the width that is stored."""
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
_READABLE = "PNG, JPEG, GIF, WebP, BMP, TIFF or PPM"
# What Pillow's decoders raise on damaged data.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError, struct.error, zlib.error)


class ImageError(ValueError):
    """A picture that cannot be used; one sentence that names it."""


@dataclass(frozen=True)
class LoadedImage:
    """A picture in RGB, upright."""

    image: Image.Image
    notes: tuple[str, ...] = ()
    """What the user should know, such as frames that were left out."""


def open_image(source: Path | str | bytes, transparency: Transparency = "white") -> LoadedImage:
    """Reads a picture from a file or from its bytes. `transparency` is what the model wants behind transparent parts.

    Raises ImageError for what is missing, too large, damaged or no picture.
    """
    name = "the picture" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else _read(Path(source))
    return decode_picture(name, data, transparency)


def decode_picture(name: str, data: bytes, transparency: Transparency = "white") -> LoadedImage:
    """The same of bytes that messages call `name`."""
    if not data:
        raise ImageError(f"{name}: the file is empty")
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"{name}: larger than {MAX_FILE_BYTES // 2**20} MB")
    with _opened(name, io.BytesIO(data)) as image:
        # A phone's JPEG may carry a preview beside the picture (MPO): nothing worth a note.
        frames = image.format != "MPO" and getattr(image, "is_animated", False)
        image.seek(0)
        image.load()
        upright = ImageOps.exif_transpose(image)
        rgb = _to_rgb(upright, transparency)
    return LoadedImage(rgb, (f"{name} has several frames; only the first is looked at",) if frames else ())


def picture_size(name: str, file: BinaryIO) -> tuple[int, int]:
    """Height and width that `decode_picture` will find, from the header alone. `file` can be sought.

    Raises ImageError for what is too large or no picture; mostly, what is damaged behind its header is not found out.
    """
    with _opened(name, file) as image:
        if image.format == "TIFF":  # which Pillow turns while it decodes it, or before, as its version goes
            image.load()
            upright = ImageOps.exif_transpose(image)
            return upright.height, upright.width
        # Pillow decodes a whole PNG to tell that it has no orientation.
        noted = image.format != "PNG" or _has_notes(file)
        turned = noted and image.getexif().get(_ORIENTATION) in _ACROSS
        return (image.width, image.height) if turned else (image.height, image.width)


def _has_notes(png: BinaryIO) -> bool:
    """Whether any chunk may hold an orientation; those behind the pixels too."""
    png.seek(8)
    while len(head := png.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return True
        png.seek(length + 4, io.SEEK_CUR)
    return False


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: a folder, not a picture") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ImageError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


@contextmanager
def _opened(name: str, file: BinaryIO) -> Iterator[Image.Image]:
    """The picture before it is decoded; whatever Pillow raises in between becomes an ImageError."""
    too_large = ImageError(f"{name}: more than {MAX_PIXELS // 1_000_000} megapixels")
    with warnings.catch_warnings():
        # Its size is checked here, by our own limit; other warnings are about metadata that nothing reads.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(file, formats=_FORMATS)
        except UnidentifiedImageError:
            raise ImageError(f"{name}: not a picture that can be read ({_READABLE})") from None
        except Image.DecompressionBombError:
            raise too_large from None
        except _DAMAGED as error:
            raise ImageError(f"{name}: damaged ({error})") from None
        if image.width * image.height > MAX_PIXELS:
            raise too_large
        try:
            yield image
        except _DAMAGED as error:
            raise ImageError(f"{name}: damaged ({error})") from None


def _to_rgb(image: Image.Image, transparency: Transparency) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bit grey, which Pillow would clip to 255 instead of scaling
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if transparency == "white" and image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
