"""A picture becomes the pixels that the family's own processor makes of it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from skipvision.config import ModelConfig, TextConfig, TilesConfig, VisionConfig
from svcli_engines.images import open_image
from svcli_export import pixels
from svcli_export.manifest import ImageProcessing
from svcli_export.pixels import Views, to_pixels, to_views
from svcli_export.published_pictures import read_pictures
from tests.export.published import their_pictures
from tests.optional import missing

EXAMPLES = Path(__file__).parents[2] / "examples"
BOUND = 1e-5
GREY_LEVEL = 1.01 / 255 / 0.26
SIDES = {
    **dict.fromkeys(("clip", "llava", "llava_next"), 336),
    **dict.fromkeys(("siglip", "llava_onevision"), 384),
    "smolvlm": 512,
    "idefics3": 364,
}
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
FAMILIES = ("clip", "llava", "siglip", "llava_next", "llava_onevision", "smolvlm", "idefics3")


def tiles(family: str, side: int) -> TilesConfig | None:
    if family == "llava_next":
        return TilesConfig(tuple((side * rows, side * columns) for rows, columns in PINPOINTS))
    if family == "llava_onevision":
        grid = [(side * rows, side * columns) for rows in range(1, 7) for columns in range(1, 7)]
        return TilesConfig(tuple(grid), max_tiles=9, among_others=False)
    return TilesConfig(longest_edge=4 * side) if family in ("smolvlm", "idefics3") else None


@dataclass(frozen=True)
class Pair:
    """Their processor of a family, and how a picture is made here by what it writes into a file."""

    processor: Any
    config: ModelConfig

    def views(self, picture: Image.Image, is_alone: bool = True) -> Views:
        seen = read_pictures(self.processor.to_dict(), self.config)
        return to_views(picture, seen.processing, seen.config, is_alone)

    def check(self, picture: Image.Image) -> None:
        views = self.views(picture)
        found, expected = views.pixels, np.array(self.processor(picture)["pixel_values"])
        assert found.dtype == np.float32
        if self.config.tiles is not None and self.config.tiles.is_joined and not views.cut.rows:
            # A strip of whose mosaic no line would be left: here the thumbnail alone.
            assert max(picture.size) > 2 * min(picture.size)
            if self.config.tiles.among_others:
                expected = expected.reshape(-1, *found.shape[1:])[:1]
            else:  # made as among other pictures, which is held against theirs below
                expected = self.views(picture, is_alone=False).pixels
        assert found.size == expected.size
        np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=0, atol=BOUND)


def pair(family: str, side: int = 0) -> Pair:
    """`side` of the encoder's input, as it is published where none is given."""
    if find_spec("transformers") is None:
        missing("transformers")
    side = side or SIDES[family]
    cut, square = tiles(family, side), {"height": side, "width": side}
    options: dict[str, Any] = {"size": square}
    if family in ("clip", "llava", "llava_next"):
        options = {"size": {"shortest_edge": side}, "crop_size": square}
    if family == "llava":
        options["do_pad"] = True
    if cut is not None and cut.is_joined:
        options["image_grid_pinpoints"] = [list(size) for size in cut.sizes]
    elif cut is not None:
        options = {"size": {"longest_edge": cut.longest_edge}, "max_image_size": {"longest_edge": side}}
    config = ModelConfig(VisionConfig(image_size=side, patch_size=7), TextConfig(), None, cut)
    return Pair(their_pictures(family)(**options), config)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["hamburgers.png", "kangaroos.png"])
def test_real_pictures_become_the_pixels_of_the_familys_own_processor(family: str, name: str) -> None:
    pair(family).check(open_image(EXAMPLES / name).image)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 900), height=st.integers(1, 900))
def test_pictures_of_any_size_do(family: str, width: int, height: int) -> None:
    pair(family, side=28).check(noise(width, height, seed=width * height))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (56, 56), (28, 29), (112, 56)], ids=str)
def test_the_smallest_and_the_thinnest_pictures_do(family: str, size: tuple[int, int]) -> None:
    pair(family, side=28).check(noise(*size))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "llava_next", "smolvlm"])
def test_a_huge_picture_does(family: str) -> None:
    pair(family).check(noise(64, 48).resize((8000, 6000)))


@pytest.mark.parametrize("size", [(500, 300), (300, 500), (64, 64)], ids=str)
def test_onevision_sees_pictures_whole_where_there_are_several(size: tuple[int, int]) -> None:
    onevision, picture = pair("llava_onevision"), noise(*size)
    expected = np.array(onevision.processor([[picture, picture]])["pixel_values"])[0]
    found = onevision.views(picture, is_alone=False)
    assert found.cut.num_views == 1
    np.testing.assert_allclose(found.pixels, expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize("size", [(56, 56), (700, 200), (200, 700), (3, 1000), (1023, 1025)], ids=str)
def test_smolvlm_counts_rows_and_columns_alike(size: tuple[int, int]) -> None:
    smolvlm = pair("smolvlm", side=28)
    expected = smolvlm.processor(noise(*size), return_row_col_info=True)
    cut = smolvlm.views(noise(*size)).cut
    assert (cut.rows, cut.columns) == (expected["rows"][0][0], expected["cols"][0][0])


@pytest.mark.parametrize("size", [(900, 300), (300, 900), (2000, 3), (3, 2001), (300, 300)], ids=str)
def test_the_middle_of_a_thread_needs_not_the_whole_of_it(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, picture = pair("clip"), noise(*size)
    exact = clip.views(picture).pixels
    monkeypatch.setattr(pixels, "_MOST_PIXELS", 1)
    assert np.abs(clip.views(picture).pixels - exact).max() <= GREY_LEVEL


@pytest.mark.parametrize("size", [(900, 300), (300, 900)], ids=str)
def test_a_panorama_is_padded_when_it_is_small(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    llava, picture = pair("llava"), noise(8, 8).resize(size)
    exact = llava.views(picture).pixels
    monkeypatch.setattr(pixels, "_MOST_PIXELS", 1)
    apart = np.abs(llava.views(picture).pixels - exact)[0].max(0) > 2 * GREY_LEVEL
    # Where picture and padding meet, they are mixed otherwise: two lines on either side.
    assert apart.mean() <= 4 / 336


def saved(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(noise(40, 30), "JPEG", exif=exif, quality=95)


def see_through(mode: str) -> Image.Image:
    picture = noise(40, 30).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize((40, 30)))
    return picture.convert(mode)


FILES = {
    "grey": lambda: saved(noise(40, 30).convert("L"), "PNG"),
    "rgba": lambda: saved(see_through("RGBA"), "PNG"),
    "grey with alpha": lambda: saved(see_through("LA"), "PNG"),
    "palette": lambda: saved(noise(40, 30).convert("P"), "PNG", transparency=3),
    "black and white": lambda: saved(noise(40, 30).convert("1"), "PNG"),
    "cmyk": lambda: saved(noise(40, 30).convert("CMYK"), "JPEG"),
    "turned by EXIF": rotated,
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_opened_as_transformers_opens_them(name: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(FILES[name]())
    clip = pair("clip", side=28)
    opened = import_module("transformers.image_utils").load_image(str(path))
    expected = np.array(clip.processor(opened)["pixel_values"])
    seen = read_pictures(clip.processor.to_dict(), clip.config)
    picture = open_image(path, seen.processing.transparency).image
    np.testing.assert_allclose(clip.views(picture).pixels, expected, rtol=0, atol=BOUND)


def test_only_our_own_models_see_white_behind_what_is_transparent() -> None:
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    data = saved(clear, "PNG")
    assert open_image(data).image.getpixel((0, 0)) == (255, 255, 255)
    assert open_image(data, "dropped").image.getpixel((0, 0)) == (200, 0, 0)


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped() -> None:
    """Pillow alone, and so transformers, makes nearly everything white."""
    data = saved(Image.fromarray(np.full((4, 4), 0x8000, np.uint16)), "PNG")
    assert open_image(data, "dropped").image.getpixel((0, 0)) == (128, 128, 128)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400))
def test_our_own_models_get_the_pixels_that_they_were_trained_on(width: int, height: int) -> None:
    processing = ImageProcessing(image_size=28, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    picture = noise(width, height)
    scale = 28 / max(width, height)
    small = picture.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (28, 28), (128, 102, 76))
    square.paste(small, ((28 - small.width) // 2, (28 - small.height) // 2))
    values = np.asarray(square, np.float32) / 255
    expected = (values - np.array(processing.mean, np.float32)) / np.array(processing.std, np.float32)
    np.testing.assert_array_equal(to_pixels(picture, processing), expected.transpose(2, 0, 1))
    plain = ModelConfig(VisionConfig(image_size=28, patch_size=7), TextConfig())
    np.testing.assert_array_equal(to_views(picture, processing, plain).pixels[0], expected.transpose(2, 0, 1))
