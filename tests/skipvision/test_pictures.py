"""A picture's header tells the size that its pixels will have, whatever turns it."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image

from skipvision.pictures import ImageError, open_image, picture_size


def encoded(file_format: str, orientation: int) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", (20, 10), "red").save(buffer, file_format, exif=exif)
    return buffer.getvalue()


def with_late_exif(png: bytes) -> bytes:
    """The same with its eXIf chunk behind the pixels, as some cameras' software writes it."""
    chunks, place = [], 8
    while place < len(png):
        length = struct.unpack(">I", png[place : place + 4])[0]
        chunks.append(png[place : place + length + 12])
        place += length + 12
    exif = next(chunk for chunk in chunks if chunk[4:8] == b"eXIf")
    assert zlib.crc32(exif[4:-4]) == struct.unpack(">I", exif[-4:])[0]
    others = [chunk for chunk in chunks if chunk is not exif]
    return png[:8] + b"".join([*others[:-1], exif, others[-1]])


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_size_is_that_of_the_upright_picture(file_format: str, orientation: int) -> None:
    data = encoded(file_format, orientation)
    for each in (data, with_late_exif(data)) if file_format == "PNG" else (data,):
        width, height = open_image(each).image.size
        assert picture_size("it", io.BytesIO(each)) == (height, width)
    assert (height, width) == ((20, 10) if orientation >= 5 else (10, 20))


@pytest.mark.parametrize("file_format", ["GIF", "BMP", "PPM"])
def test_formats_without_notes_have_the_size_that_they_say(file_format: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, file_format)
    assert picture_size("it", buffer) == (10, 20)


def test_no_pixel_is_read_for_a_size() -> None:
    buffer = io.BytesIO()
    Image.effect_noise((900, 700), 90).save(buffer, "JPEG", quality=95)
    assert picture_size("it", io.BytesIO(buffer.getvalue()[:2000])) == (700, 900)


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"II*\0\xff\xff\xff\xff"])
def test_what_has_no_header_is_named(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"^it: (not a picture|damaged)"):
        picture_size("it", io.BytesIO(data))
