"""What is marked on a picture is where the model saw it.

The oracle is the way that pictures go to the model: a picture whose colours tell places is made into pixels, and what a
token's pixels show is where its box must be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from skipvision.config import ModelConfig, ResamplerConfig, TilesConfig
from skipvision.tiles import Cut, cut_picture, mosaic, token_counts
from svcli_engines.overlay import LARGEST, SMALLEST, Box, OverlayError, mark_retained, retained_boxes
from svcli_export.manifest import Fit, ImageProcessing
from svcli_export.pixels import Views, to_views
from tests.skipvision.tiny import tiny_config

SIDE, GRID = 48, 4
FITS: Sequence[Fit] = get_args(Fit)
SEVERAL = settings(max_examples=40, deadline=None, derandomize=True)
LENGTHS = st.integers(40, 400)
Floats = npt.NDArray[np.float64]


def model(tiles: TilesConfig | None = None, pixel_shuffle: int = 1) -> ModelConfig:
    config = tiny_config(position=False, convs=0)
    vision = replace(config.vision, image_size=SIDE, patch_size=SIDE // GRID)
    return replace(config, vision=vision, tiles=tiles, pixel_shuffle=pixel_shuffle, skip=None)


def processing(fit: Fit = "pad") -> ImageProcessing:
    # Padding has no blue, as pictures here have.
    return ImageProcessing(image_size=SIDE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), fit=fit, resample="bilinear")


def places_as_colours(width: int, height: int) -> Image.Image:
    """Red tells the share of the width, green that of the height; all is blue."""
    across, down = ((np.arange(length) + 0.5) / length * 255 for length in (width, height))
    red, green = np.meshgrid(across, down)
    pixels = np.stack([red, green, np.full_like(red, 255)], -1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def seen(views: Views, side: int) -> Floats:
    """[num_views, T, 3]: the place (across, down) that each square shows, and how much of it is picture."""
    table = []
    for view in views.pixels.astype(np.float64).transpose(0, 2, 3, 1):
        lines = SIDE // side
        for token in range(lines**2):
            top, left = token // lines * side, token % lines * side
            square = view[top : top + side, left : left + side].reshape(-1, 3)
            inside = square[square[:, 2] > 0.9]
            place = inside.mean(0)[:2] if len(inside) else np.zeros(2)
            table.append([*place, len(inside) / len(square)])
    return np.array(table).reshape(len(views.pixels), -1, 3)


def middle(box: Box) -> Floats:
    return np.array([(box.left + box.right) / 2, (box.top + box.bottom) / 2])


def check(boxes: Sequence[Box], shown: Floats, size: tuple[float, float]) -> None:
    """One token's boxes against what its pixels show; `size` of a pixel of its view in shares of the picture."""
    across, down, share = shown
    if share == 0:
        # Of squares with a sliver of the picture, resampling may leave nothing.
        assert all((box.right - box.left) < 2 * size[0] or (box.bottom - box.top) < 2 * size[1] for box in boxes)
    elif share > 0.2:
        (box,) = boxes
        # Two pixels of the view, and how colours are rounded.
        assert np.all(np.abs(middle(box) - [across, down]) <= 2 * np.array(size) + 0.01)


@SEVERAL
@given(fit=st.sampled_from(FITS), width=LENGTHS, height=LENGTHS, shuffle=st.sampled_from([1, 2]))
@example(fit="crop", width=400, height=41, shuffle=1)
def test_a_box_is_where_its_token_looks(fit: Fit, width: int, height: int, shuffle: int) -> None:
    config, process, cut = model(pixel_shuffle=shuffle), processing(fit), Cut(height, width)
    side = SIDE // GRID * shuffle
    shown = seen(to_views(places_as_colours(width, height), process, config), side)[0]
    reach = {"pad": max, "pad_first": max, "crop": min, "stretch": None}[fit]
    size = (1 / SIDE, 1 / SIDE)
    if reach is not None:
        scale = reach(width, height) / SIDE
        size = (scale / width, scale / height)
    for token, place in enumerate(shown):
        check(retained_boxes(np.array([[token]]), config, process, cut), place, size)


@SEVERAL
@given(width=LENGTHS, height=LENGTHS, shuffle=st.sampled_from([1, 2]))
def test_tiles_that_stand_alone_are_marked_each_by_itself(width: int, height: int, shuffle: int) -> None:
    config, process = model(TilesConfig(longest_edge=3 * SIDE), shuffle), processing()
    views = to_views(places_as_colours(width, height), process, config)
    shown = seen(views, SIDE // GRID * shuffle)
    boxes = retained_boxes(np.tile(np.arange(shown.shape[1]), (len(shown), 1)), config, process, views.cut)
    assert len(boxes) == shown.shape[0] * shown.shape[1]
    for box, place in zip(boxes, shown.reshape(-1, 3), strict=True):
        check([box], place, (1 / SIDE, 1 / SIDE))
    # Tiles cover the picture, and so does the thumbnail.
    area = sum((box.right - box.left) * (box.bottom - box.top) for box in boxes)
    assert area == pytest.approx(2 if len(shown) > 1 else 1)


@SEVERAL
@given(width=LENGTHS, height=LENGTHS, max_tiles=st.sampled_from([0, 1, 2]))
@example(width=400, height=40, max_tiles=0)
def test_tokens_of_a_mosaic_are_marked_where_their_patches_lie(width: int, height: int, max_tiles: int) -> None:
    sizes = tuple((SIDE * lines, SIDE * columns) for lines in range(1, 4) for columns in range(1, 4))
    config, process = model(TilesConfig(sizes, max_tiles=max_tiles)), processing()
    views = to_views(places_as_colours(width, height), process, config)
    cut = views.cut
    assert cut == cut_picture(config, height, width)
    table = np.vstack([seen(views, SIDE // GRID).reshape(-1, 3), np.zeros(3)])
    pieces = mosaic(config, cut)
    (count,) = token_counts(config, cut)
    newlines = 0
    for token in range(count):
        index, weight = pieces.index[:, token], pieces.weight[:, token].astype(np.float64)
        boxes = retained_boxes(np.array([[token]]), config, process, cut)
        if index[0] == len(table) - 1:
            newlines += 1
            assert boxes == ()
            continue
        if table[index, 2].min() < 0.6:  # half in the padding, where the places it shows are not its middle
            continue
        expected = (table[index, :2] * weight[:, None]).sum(0)
        found = np.mean([middle(box) for box in boxes], 0)
        # Patches that hardly count are left out: half a patch of the mosaic, and as before.
        patch = np.array([boxes[0].right - boxes[0].left, boxes[0].bottom - boxes[0].top])
        assert np.all(np.abs(found - expected) <= patch * (0.5 if max_tiles else 0.2) + 0.02)
    assert newlines == (count - GRID**2) // (count // GRID if not cut.rows else _columns(config, cut) + 1)


def _columns(config: ModelConfig, cut: Cut) -> int:
    """Of tokens in a line of the mosaic: those up to the first newline."""
    newline = config.num_tokens * cut.num_views
    return int(np.argmax(mosaic(config, cut).index[0, GRID**2 :] == newline))


def test_nothing_can_be_marked_where_nothing_was_selected_or_tokens_are_no_patches() -> None:
    config, cut = model(), Cut(10, 20)
    with pytest.raises(OverlayError, match="selects no patches"):
        retained_boxes(None, config, processing(), cut)
    resampler = replace(
        config,
        projector="resampler",
        projector_norm=False,
        resampler=ResamplerConfig(windows=(4,), queries=(4,), num_heads=2),
    )
    with pytest.raises(OverlayError, match="resampler"):
        mark_retained(Image.new("RGB", (20, 10)), np.array([[0]]), resampler, processing(), cut)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 30), (120, 120, 120)])
def test_the_outline_can_be_told_from_any_ground_without_colour(colour: tuple[int, int, int]) -> None:
    picture = Image.new("RGB", (SMALLEST, SMALLEST), colour)
    cut = Cut(SMALLEST, SMALLEST)
    marked = mark_retained(picture, np.array([[5, 6, 9, 10]]), model(), processing(), cut)
    grey = np.asarray(marked.convert("L")).astype(int)[SMALLEST // 2]
    edge = grey[SMALLEST // 4 - 1 : SMALLEST // 4 + 8]
    assert edge.max() - edge.min() > 100
    assert marked.getpixel((SMALLEST // 2, SMALLEST // 2)) == colour
    red, green, blue = np.asarray(marked)[4, 4].tolist()
    assert red == green == blue


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (1, 3000), (4000, 30), (3000, 2000), (700, 500)])
def test_drawings_are_of_a_size_that_can_be_looked_at(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, "blue")
    for fit in FITS:
        marked = mark_retained(picture, np.array([[0, 7, 8]]), model(), processing(fit), Cut(size[1], size[0]))
        longest = max(marked.size)
        assert SMALLEST <= longest <= LARGEST
        assert longest == min(max(max(size), SMALLEST), LARGEST)
        scale = longest / max(size)
        assert marked.size == tuple(max(1, round(length * scale)) for length in size)
    assert picture.size == size


def test_everything_retained_leaves_the_picture_as_it_is_inside() -> None:
    picture = places_as_colours(600, 500)
    marked = mark_retained(picture, np.arange(GRID**2)[None], model(), processing(), Cut(500, 600))
    inside = (20, 20, 580, 480)
    assert marked.crop(inside).tobytes() == picture.crop(inside).tobytes()
