"""Scenes are what their items say, the same for a seed, and keep held-out things out."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision.data.assets import Assets
from skipvision.data.canvas import MAX_OVERLAP, overlap
from skipvision.data.names import COLOUR_IDS, LABEL_IDS, LABELS
from skipvision.data.scenes import Scene, render, render_shapes
from skipvision.data.split import SPLITS, Split, colour_is_held_out, pair_is_held_out

SEEDS = st.integers(0, 2**32 - 1)
ANY_SPLIT = st.sampled_from(SPLITS)
FEW = settings(max_examples=60, deadline=None)


def scenes(assets: Assets, split: Split, number: int = 150) -> list[Scene]:
    return [render(assets, seed, split) for seed in range(number)]


@FEW
@given(seed=SEEDS, split=ANY_SPLIT)
def test_a_seed_always_gives_the_same_scene(assets: Assets, seed: int, split: Split) -> None:
    first, second = render(assets, seed, split), render(assets, seed, split)
    assert first.items == second.items
    assert first.image.tobytes() == second.image.tobytes()
    assert np.array_equal(first.labels, second.labels)


def test_splits_draw_from_different_seeds(assets: Assets) -> None:
    pictures = {render(assets, 5, split).image.tobytes() for split in SPLITS}
    assert len(pictures) == len(SPLITS)


@FEW
@given(seed=SEEDS, split=ANY_SPLIT)
def test_everything_lies_inside_the_picture_and_apart(assets: Assets, seed: int, split: Split) -> None:
    scene = render(assets, seed, split)
    assert (scene.image.size, scene.image.mode) == ((224, 224), "RGB")
    assert scene.items
    for item in scene.items:
        left, top, right, bottom = item.box
        assert 0 <= left < right <= 224
        assert 0 <= top < bottom <= 224
    for first, second in combinations(scene.items, 2):
        limit = 0.0 if "text" in (first.category, second.category) else MAX_OVERLAP
        assert overlap(first.box, second.box) <= limit


@FEW
@given(seed=SEEDS, split=ANY_SPLIT)
def test_patch_maps_show_the_items_and_nothing_else(assets: Assets, seed: int, split: Split) -> None:
    scene = render(assets, seed, split)
    assert (scene.labels.shape, scene.labels.dtype) == ((16, 16), np.dtype(np.int16))
    assert (scene.colours.shape, scene.colours.dtype) == ((16, 16), np.dtype(np.int8))
    allowed = {""}
    for item in scene.items:
        allowed |= set(item.text.upper()) if item.text is not None else {item.name}
    assert {LABELS[i] for i in np.unique(scene.labels)} <= allowed
    ids = {COLOUR_IDS[item.colour] for item in scene.items if item.colour is not None}
    assert set(np.unique(scene.colours)) <= ids | {0}
    assert (scene.labels[scene.cover == 0] == 0).all()
    assert scene.cover.min() >= 0
    assert scene.cover.max() <= 1


@FEW
@given(seed=SEEDS)
def test_big_things_label_the_patch_at_their_centre(assets: Assets, seed: int) -> None:
    scene = render(assets, seed, "train")
    for item in scene.items:
        left, top, right, bottom = item.box
        if item.category == "text" or min(right - left, bottom - top) < 48:
            continue
        if any(overlap(item.box, other.box) > 0 for other in scene.items if other is not item):
            continue
        x, y = item.centre
        assert scene.labels[int(y) // 14, int(x) // 14] == LABEL_IDS[item.name]


@FEW
@given(seed=SEEDS)
def test_training_never_shows_what_is_held_out(assets: Assets, seed: int) -> None:
    scene = render(assets, seed, "train")
    kinds = {item.name for item in scene.items if item.category == "object"}
    assert not any(pair_is_held_out(*pair) for pair in combinations(kinds, 2))
    for item in scene.items:
        assert item.style not in ("openmoji", "Unseen")
        if item.category == "shape":
            assert item.colour is not None
            assert not colour_is_held_out(item.colour, item.name)
        if item.text is not None:
            assert item.text.lower() not in assets.test_words


def test_training_never_draws_a_held_out_photograph(assets: Assets) -> None:
    held_out = {cutout.source for cutout in assets.cutouts if cutout.held_out}
    for split in ("train", "val", "test"):
        drawn = {c.source for cutouts in assets.cutouts_for(split).values() for c in cutouts}
        assert not drawn & held_out


def test_test_splits_draw_only_what_they_test(assets: Assets) -> None:
    styles = {i.style for s in scenes(assets, "test_style") for i in s.items if i.category == "object"}
    assert styles == {"openmoji"}
    photos = {i.style for s in scenes(assets, "test_photo") for i in s.items if i.category == "object"}
    assert photos == {"photo"}
    for scene in scenes(assets, "test_font"):
        assert [i.style for i in scene.items if i.category == "text"] == ["Unseen"]


def test_combinations_held_out_of_training_turn_up_in_tests(assets: Assets) -> None:
    shapes = [i for s in scenes(assets, "test", 300) for i in s.items if i.category == "shape"]
    assert any(i.colour is not None and colour_is_held_out(i.colour, i.name) for i in shapes)
    pairs = [
        pair
        for s in scenes(assets, "test", 300)
        for pair in combinations({i.name for i in s.items if i.category == "object"}, 2)
    ]
    assert any(pair_is_held_out(*pair) for pair in pairs)


@pytest.mark.parametrize("split", ["test", "test_font"])
def test_words_in_tests_are_unseen(assets: Assets, split: Split) -> None:
    read = {i.text.lower() for s in scenes(assets, split, 300) for i in s.items if i.text is not None}
    assert read & set(assets.test_words)
    assert not read & set(assets.words)


def test_every_plan_shows_up(assets: Assets) -> None:
    found = scenes(assets, "train", 300)
    most = [max(sum(i.name == j.name for j in s.items) for i in s.items) for s in found]
    assert set(range(1, 7)) <= set(most)
    assert {i.category for s in found for i in s.items} == {"object", "shape", "text"}


def test_shapes_need_no_art_and_are_the_same_each_time() -> None:
    for seed in range(20):
        first, again = render_shapes(seed), render_shapes(seed)
        assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
        assert {item.category for item in first.items} == {"shape"}
        assert (first.labels > 0).any()
    assert not np.array_equal(np.asarray(first.image), np.asarray(render_shapes(0).image))
