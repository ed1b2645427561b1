"""Pictures as people have them: odd ones are read, broken ones get one sentence that names them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from skipvision import pictures
from svcli_engines.images import ImageError, open_image
from svcli_export.manifest import ImageProcessing
from svcli_export.pixels import to_pixels

PROCESSING = ImageProcessing(image_size=28, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixel(data: bytes, place: tuple[int, int] = (0, 0)) -> Any:
    return open_image(data).image.getpixel(place)


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(30_000, 30_000), (11_000, 10_000)])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(*size))
    with pytest.raises(ImageError, match=r"bomb\.png: more than 100 megapixels"):
        open_image(path)


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(b"x" * 2000)
    monkeypatch.setattr(pictures, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ImageError, match=r"large\.png: larger than"):
        open_image(path)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    text = tmp_path / "letter.jpg"
    text.write_text("Dear reader, this is no picture.")
    empty = tmp_path / "empty.png"
    empty.touch()
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)), "JPEG")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole[: len(whole) // 2])
    for path, message in (
        (text, "not a picture that can be read"),
        (empty, "the file is empty"),
        (cut, "damaged"),
        (tmp_path, "a folder, not a picture"),
        (tmp_path / "absent.png", "no such file"),
        (Path("null\0byte.png"), "cannot be read"),
    ):
        with pytest.raises(ImageError) as caught:
            open_image(path)
        assert str(caught.value).startswith(f"{path}: {message}")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_usual_formats_are_read(file_format: str) -> None:
    red, green, blue = pixel(encoded(Image.new("RGB", (8, 8), (250, 10, 10)), file_format), (4, 4))
    assert red > 240
    assert max(green, blue) < 25


def test_formats_that_run_programs_are_not_opened() -> None:
    with pytest.raises(ImageError, match="not a picture"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_is_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    data = encoded(image.convert(mode), "TIFF" if mode == "PA" else "PNG")
    assert pixel(data) == (255, 255, 255)


def test_half_transparent_is_mixed_with_white() -> None:
    red, green, _ = pixel(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "PNG"))
    assert red == 255
    assert 125 <= green <= 129


def test_palette_with_a_transparent_entry_is_white_there() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    data = encoded(image, "PNG", transparency=0)
    assert pixel(data, (0, 0)) == (255, 255, 255)
    assert pixel(data, (1, 0)) == (40, 50, 60)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 0x4000, 0x8000, 0xFFFF]], np.uint16)
    image = open_image(encoded(Image.fromarray(values), "PNG")).image
    assert [image.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 0x40, 0x80, 0xFF)]


def test_cmyk_becomes_rgb() -> None:
    red, green, blue = pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red > 240
    assert max(green, blue) < 30


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_other_modes_become_rgb(mode: str) -> None:
    assert pixel(encoded(Image.new("RGB", (4, 4), "white").convert(mode), "PNG")) == (255, 255, 255)


def test_only_the_first_frame_of_an_animation_is_used_and_this_is_said() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    loaded = open_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert loaded.image.getpixel((0, 0)) == (255, 0, 0)
    assert loaded.notes == ("the picture has several frames; only the first is looked at",)
    assert open_image(encoded(frames[0], "GIF")).notes == ()


def test_exif_rotation_is_honoured() -> None:
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    loaded = open_image(encoded(image, "PNG", exif=exif)).image
    assert loaded.size == (1, 2)
    assert loaded.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2), (28, 28), (640, 480)])
def test_any_size_becomes_the_model_s_square(size: tuple[int, int]) -> None:
    result = to_pixels(Image.new("RGB", size, "white"), PROCESSING)
    assert result.shape == (3, 28, 28)
    assert result.dtype == np.float32
    white = np.isclose(result, np.array([2.5, 3.0, 3.5])[:, None, None], atol=1e-5).all(axis=0)
    assert white[13:15, 13:15].any()  # a line of one pixel stands on one side of the middle


def test_padding_is_the_mean_colour_on_both_sides() -> None:
    result = to_pixels(Image.new("RGB", (56, 28), "white"), PROCESSING)
    assert np.abs(result[:, :7]).max() < 0.02  # 8 bit rounding of the mean
    assert np.abs(result[:, 21:]).max() < 0.02
    np.testing.assert_allclose(result[0, 7:21], 2.5, atol=1e-5)


def test_a_picture_is_resized_bicubically() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8))
    expected = np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC), np.float32) / 255
    got = to_pixels(image, PROCESSING) * 0.2 + np.array(PROCESSING.mean, np.float32)[:, None, None]
    np.testing.assert_allclose(got, expected.transpose(2, 0, 1), atol=1e-6)
