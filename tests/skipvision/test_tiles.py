"""How pictures are cut, against the functions of transformers: thousands of sizes, down to a line of one pixel."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from math import isqrt, sqrt
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skipvision.config import ConfigError, ModelConfig, SkipConfig, TilesConfig
from skipvision.known_models import known_model
from skipvision.layout import ImageSpan, largest_spans, picture_spans
from skipvision.model import SkipVisionModel
from skipvision.tiles import Cut, best_size, cut_picture, mosaic, most_tokens, most_views, scaled_sizes, token_counts
from tests.skipvision import zoo

THOUSANDS = settings(max_examples=1000, deadline=None, derandomize=True)
SOME = settings(max_examples=200, deadline=None, derandomize=True)
SIZES = st.tuples(st.integers(1, 5000), st.integers(1, 5000)) | st.tuples(st.integers(1, 60), st.integers(1, 60))
LINES = [(1, 5000), (5000, 1), (1, 1), (2, 999), (999, 2)]


def known(name: str) -> ModelConfig:
    model = known_model(name)
    assert model is not None
    return model.config


NEXT, ONEVISION = known("llava-v1.6-vicuna-7b-hf"), known("llava-onevision-qwen2-0.5b-ov-hf")
SMOLVLM = known("SmolVLM-256M-Instruct")


def small(config: ModelConfig, grid: int, max_tiles: int = 0) -> ModelConfig:
    """With few patches, and every mosaic of up to 4 by 4 tiles."""
    side = 10 * grid
    sizes = tuple((side * lines, side * columns) for lines in range(1, 5) for columns in range(1, 5))
    vision = replace(config.vision, image_size=side, patch_size=10)
    return replace(config, vision=vision, tiles=TilesConfig(sizes, max_tiles=max_tiles))


JOINED = {
    "next": NEXT,
    "onevision": ONEVISION,
    "odd": small(NEXT, 3),
    "even": small(NEXT, 4),
    "shrunk": small(ONEVISION, 3, 2),
    "shrunk to one": small(ONEVISION, 4, 1),
    "shrunk to nothing": small(ONEVISION, 1, 1),
}


def num_tokens(config: ModelConfig, size: tuple[int, int]) -> int:
    return sum(token_counts(config, cut_picture(config, *size)))


def processor(config: ModelConfig) -> Any:
    """Theirs, with no more than it counts with."""
    library, tiles = zoo.transformers(), config.tiles
    assert tiles is not None
    cls = library.LlavaOnevisionProcessor if tiles.max_tiles else library.LlavaNextProcessor
    made = cls.__new__(cls)
    made.image_processor = SimpleNamespace(image_grid_pinpoints=[list(size) for size in tiles.sizes])
    if tiles.max_tiles:
        made.num_image_tokens, made.vision_aspect_ratio = config.num_tokens, f"anyres_max_{tiles.max_tiles}"
    else:
        made.patch_size, made.num_additional_image_tokens = config.vision.patch_size, 1
        made.vision_feature_select_strategy = "default"
    return made


def left_of_mosaic(config: ModelConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Lines and columns of patches, by their own function and the shrinking that stands in their model."""
    modeling = import_module(f"{zoo.transformers().__name__}.models.llava_next.modeling_llava_next")
    assert config.tiles is not None
    grid = [length // config.vision.image_size * config.vision.grid for length in best_size(config.tiles.sizes, *size)]
    lines, columns = modeling.unpad_image(torch.empty(1, *grid, device="meta"), size).shape[1:]
    ratio = sqrt(lines * columns / (config.tiles.max_tiles * config.num_tokens)) if config.tiles.max_tiles else 0
    return (int(lines // ratio), int(columns // ratio)) if ratio > 1.1 else (lines, columns)


@pytest.mark.parametrize("config", JOINED.values(), ids=JOINED.keys())
def test_a_joined_picture_takes_as_many_rows_as_their_processors_count(config: ModelConfig) -> None:
    theirs, side = processor(config), config.vision.image_size
    # LLaVA-NeXT counts the row of CLS here, and drops it later.
    dropped = 0 if config.tiles is not None and config.tiles.max_tiles else 1

    @THOUSANDS
    @given(size=SIZES)
    @example(size=(1, 5000))
    @example(size=(5000, 1))
    def check(size: tuple[int, int]) -> None:
        if min(left_of_mosaic(config, size)):
            assert num_tokens(config, size) == theirs._get_number_of_features(*size, side, side) - dropped
        else:  # theirs has newlines alone then, or fails
            assert num_tokens(config, size) == config.num_tokens + 1
            assert cut_picture(config, *size) == Cut(*size)

    check()


def packed(config: ModelConfig, views: torch.Tensor, newline: torch.Tensor, cut: Cut) -> torch.Tensor:
    """The rows of one picture that their models make of its views [V, N, D]."""
    library, tiles = zoo.transformers(), config.tiles
    assert tiles is not None
    sizes = [list(size) for size in tiles.sizes]
    vision = SimpleNamespace(image_size=config.vision.image_size, patch_size=config.vision.patch_size)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=sizes))
    picture = [views], torch.tensor([[cut.height, cut.width]])
    if tiles.max_tiles:
        pack = library.LlavaOnevisionModel.pack_image_features
        (rows,), _ = pack(model, *picture, newline, f"anyres_max_{tiles.max_tiles}")
    else:
        pack = library.LlavaNextModel.pack_image_features
        (rows,), _ = pack(model, *picture, "default", image_newline=newline)
    assert isinstance(rows, torch.Tensor)
    return rows


def assert_packs_alike(config: ModelConfig, cut: Cut) -> bool:
    """Of marked views: each row is the place it came from. Returns whether the mosaic is shrunk."""
    count = config.num_tokens
    marks = torch.arange(count * cut.num_views + 1, dtype=torch.float64)[:, None]
    marks = torch.cat([marks, torch.randn(len(marks), 2, dtype=torch.float64)], 1)
    wanted = packed(config, marks[:-1].reshape(cut.num_views, count, 3), marks[-1], cut)
    pieces = mosaic(config, cut)
    assert pieces.index.dtype == np.int64
    assert pieces.weight.dtype == np.float32
    assert pieces.index.shape == pieces.weight.shape
    assert len(pieces.index) == (4 if config.tiles and config.tiles.max_tiles else 1)
    assert pieces.index.shape[1] == sum(token_counts(config, cut)) == len(wanted)
    assert pieces.index.size == 0 or (pieces.index.min() >= 0 and pieces.index.max() <= count * cut.num_views)
    np.testing.assert_allclose(pieces.weight.sum(0), 1, rtol=0, atol=1e-6)
    assert (pieces.weight >= 0).all()
    rows = (marks.numpy()[pieces.index] * pieces.weight[..., None]).sum(0)
    # The shares of neighbours are fp32: of marks up to 30,000 that is 2e-3.
    shrunk = bool((pieces.weight[0] < 1).any())
    np.testing.assert_allclose(rows, wanted.numpy(), rtol=1e-6 if shrunk else 0, atol=1e-5 if shrunk else 0)
    return shrunk


@pytest.mark.parametrize("config", JOINED.values(), ids=JOINED.keys())
def test_a_mosaic_is_what_their_models_pack(config: ModelConfig) -> None:
    seen = set()

    @SOME
    @given(size=SIZES)
    @example(size=(1, 5000))
    @example(size=(5000, 1))
    @example(size=(4000, 4000))
    def check(size: tuple[int, int]) -> None:
        seen.add(assert_packs_alike(config, cut_picture(config, *size)))

    check()
    assert seen == {False, *([True] if config.tiles and config.tiles.max_tiles else [])}


@pytest.mark.parametrize("config", [ONEVISION, JOINED["shrunk"]], ids=["real", "small"])
def test_among_others_only_the_thumbnail_is_seen_where_the_family_says_so(config: ModelConfig) -> None:
    config = replace(config, tiles=replace(config.tiles, among_others=False))  # type: ignore[type-var]
    cut = cut_picture(config, 900, 700, is_alone=False)
    assert cut == Cut(900, 700)
    assert cut.num_views == 1
    assert not assert_packs_alike(config, cut)
    assert token_counts(config, cut) == (config.num_tokens + 1,)
    assert mosaic(config, cut).index[0].tolist() == list(range(config.num_tokens + 1))
    assert cut_picture(config, 900, 700).num_views > 1
    assert cut_picture(replace(config, tiles=replace(config.tiles, among_others=True)), 900, 700, False).num_views > 1  # type: ignore[type-var]
    assert known("llava-onevision-qwen2-0.5b-ov-hf").tiles == replace(ONEVISION.tiles, among_others=False)  # type: ignore[type-var]
    assert NEXT.tiles is not None
    assert NEXT.tiles.among_others


@pytest.mark.parametrize("size", LINES, ids=str)
@pytest.mark.parametrize("config", JOINED.values(), ids=JOINED.keys())
def test_a_picture_of_hardly_a_line_is_its_thumbnail_and_what_rounding_leaves(
    config: ModelConfig, size: tuple[int, int]
) -> None:
    assert_packs_alike(config, cut_picture(config, *size))


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 100)], ids=str)
def test_where_padding_is_all_there_is_the_thumbnail_is_seen_alone(size: tuple[int, int]) -> None:
    """Then rows and spans still agree on two summaries, whatever is retained: the newline is left to skip."""
    assert cut_picture(NEXT, *size) == Cut(*size)
    assert token_counts(NEXT, Cut(*size)) == (576 + 1,)
    kind = next(kind for kind in zoo.KINDS if kind.family == "llava_next")
    config = replace(zoo.config_of(kind), skip=SkipConfig(16, 5, selector="first"))
    cut = cut_picture(config, *size)
    (span,) = picture_spans(config, cut)
    assert span == ImageSpan(16, 1, 2)
    with torch.no_grad():
        rows = SkipVisionModel(config).encode_picture(zoo.views(cut), cut)
    assert rows.shape == (1, span.length, 32)


def test_no_picture_leaves_a_mosaic_of_nothing() -> None:
    """Where few tokens are allowed for much padding, shrinking alone could leave no line: theirs fails there."""
    config = JOINED["shrunk to nothing"]
    thin = [(1, 3), (1, 4), (5, 17), (10, 100)]
    for size in (*thin, *((width, height) for height, width in thin)):
        assert min(token_counts(config, cut_picture(config, *size))) > config.num_tokens
        assert_packs_alike(config, cut_picture(config, *size))


@given(size=SIZES)
@THOUSANDS
def test_the_best_mosaic_is_theirs(size: tuple[int, int]) -> None:
    utilities = import_module(f"{zoo.transformers().__name__}.image_processing_utils")
    for config in (NEXT, ONEVISION):
        assert config.tiles is not None
        assert best_size(config.tiles.sizes, *size) == utilities.select_best_resolution(size, config.tiles.sizes)


class _Resized:
    """What their methods call to resize: sizes alone."""

    def resize(self, _: Any, size: Any, **__: Any) -> Any:
        return SimpleNamespace(shape=(1, size.height, size.width))


@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
@pytest.mark.parametrize(("longest_edge", "side"), [(2048, 512), (1456, 364), (333, 333), (335, 100), (96, 32), (1, 7)])
def test_smolvlm_is_cut_as_their_processors_cut(family: str, longest_edge: int, side: int) -> None:
    zoo.transformers()
    theirs = import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    cls = theirs.SmolVLMImageProcessorPil if family == "smolvlm" else theirs.Idefics3ImageProcessorPil
    vision = replace(SMOLVLM.vision, image_size=side, patch_size=1)
    config = replace(SMOLVLM, vision=vision, pixel_shuffle=1, tiles=TilesConfig(longest_edge=longest_edge))

    @settings(THOUSANDS, max_examples=500)
    @given(size=SIZES)
    @example(size=(1, 5000))
    @example(size=(5000, 1))
    @example(size=(1, 1))
    def check(size: tuple[int, int]) -> None:
        picture = SimpleNamespace(shape=(1, *size))
        try:
            first = theirs.get_resize_output_image_size(picture, longest_edge)
        except TypeError:  # one of both measures arrays alone
            first = theirs.get_resize_output_image_size(np.broadcast_to(np.uint8(0), (1, *size)), longest_edge)
        second = cls.resize_for_vision_encoder(_Resized(), SimpleNamespace(shape=(1, *first)), side).shape[1:]
        assert scaled_sizes(longest_edge, side, *size) == (tuple(first), tuple(second))
        array = np.broadcast_to(np.uint8(0), (1, *second))
        frames, rows, columns = cls.split_images(_Resized(), array, {"longest_edge": side})
        cut = cut_picture(config, *size)
        assert (cut.rows, cut.columns, cut.num_views) == (rows, columns, len(frames))
        assert token_counts(config, cut) == (config.num_tokens,) * len(frames)

    check()


@given(size=SIZES)
@settings(THOUSANDS, max_examples=400)
def test_no_picture_has_more_tokens_or_views_than_the_most(size: tuple[int, int]) -> None:
    for config in (*JOINED.values(), SMOLVLM, replace(SMOLVLM, tiles=TilesConfig(longest_edge=2047))):
        cut = cut_picture(config, *size)
        assert cut.num_views <= most_views(config)
        assert sum(token_counts(config, cut)) <= most_tokens(config)


@pytest.mark.parametrize(
    ("config", "views", "size", "tokens"),
    [
        (NEXT, 5, (672, 672), 576 + 48 * 49),
        (JOINED["odd"], 17, (120, 120), 9 + 12 * 13),
        (SMOLVLM, 17, (100, 100), 17 * 64),
        (known("llava-1.5-7b-hf"), 1, (50, 60), 576),
    ],
    ids=["next", "odd", "smolvlm", "llava"],
)
def test_the_most_is_reached(config: ModelConfig, views: int, size: tuple[int, int], tokens: int) -> None:
    assert cut_picture(config, *size).num_views == most_views(config) == views
    assert num_tokens(config, size) == most_tokens(config) == tokens


@pytest.mark.parametrize("config", [ONEVISION, JOINED["shrunk"], JOINED["shrunk to one"]], ids=["real", "3", "4"])
def test_where_mosaics_are_shrunk_the_most_is_nearly_reached(config: ModelConfig) -> None:
    """Rounding down to whole lines and columns leaves the bound a little above what a picture's shape can have."""
    side = config.vision.image_size
    shapes = {
        shape
        for lines in range(1, 7)
        for columns in range(1, 7)
        for less in range(0, side, 3)
        for shape in ((lines * side - less, columns * side), (lines * side, columns * side - less))
    }
    found = max(num_tokens(config, shape) for shape in shapes)
    assert 0.96 * most_tokens(config) <= found <= most_tokens(config)


@pytest.mark.parametrize("longest_edge", [31, 32, 33, 63, 64, 65, 96])
def test_most_views_holds_at_every_edge(longest_edge: int) -> None:
    """Also where a side is made even, which can take one tile more."""
    vision = replace(SMOLVLM.vision, image_size=32, patch_size=1)
    config = replace(SMOLVLM, vision=vision, pixel_shuffle=1, tiles=TilesConfig(longest_edge=longest_edge))
    sizes = [(height, width) for height in range(1, 40) for width in range(1, 40)]
    assert max(cut_picture(config, *size).num_views for size in sizes) == most_views(config)


def test_the_largest_spans_are_those_of_the_most_tokens() -> None:
    (joined,) = largest_spans(NEXT)
    assert (joined.num_retained, joined.num_tokens) == (2928, 2928)
    skipping = replace(NEXT, skip=SkipConfig(576, 576, selector="first"))
    (span,) = largest_spans(skipping)
    assert span == ImageSpan(576, 576, 2)
    assert len(largest_spans(SMOLVLM)) == 17
    assert {(each.num_retained, each.num_tokens) for each in largest_spans(SMOLVLM)} == {(64, 64)}
    assert largest_spans(known("llava-1.5-7b-hf")) == (ImageSpan(576),)


def test_a_thumbnail_whose_tiles_are_fewer_than_are_skipped_skips_what_there_is() -> None:
    skipping = replace(NEXT, skip=SkipConfig(576, 576, selector="first"))
    cut = cut_picture(skipping, 20, 1000)
    (plain,) = token_counts(skipping, cut)
    assert 576 < plain < 2 * 576
    assert picture_spans(skipping, cut) == (ImageSpan(576, plain - 576, 2),)


@pytest.mark.parametrize(
    ("tiles", "words"),
    [
        (lambda: TilesConfig(), "either sizes or longest_edge"),
        (lambda: TilesConfig(((336, 336),), longest_edge=5), "either sizes or longest_edge"),
        (lambda: TilesConfig(((336, 0),)), "sides must be positive"),
        (lambda: TilesConfig(longest_edge=-1), "sides must be positive"),
        (lambda: TilesConfig(((336, 336),), max_tiles=-1), "tiles.max_tiles must be at least 0"),
        (lambda: replace(NEXT, tiles=TilesConfig(((336, 337),))), "multiples of vision.image_size 336"),
        (lambda: replace(SMOLVLM, tiles=TilesConfig(((512, 512),))), "tiles.sizes need pixel_shuffle 1"),
    ],
)
def test_tiles_that_cannot_be_are_refused(tiles: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiles()


def test_pixel_shuffle_divides_the_grid() -> None:
    assert isqrt(SMOLVLM.num_tokens) * 4 == SMOLVLM.vision.grid
    with pytest.raises(ConfigError, match="pixel_shuffle must divide 32, got 5"):
        replace(SMOLVLM, pixel_shuffle=5)
