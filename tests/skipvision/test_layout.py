"""TokenLayout by brute force: whatever the segments, order, sources, sights and counts are those of plain lists."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision.config import SkipConfig, Visibility
from skipvision.layout import RETAINED, SKIPPED, SUMMARY, TEXT, BatchLayout, ImageSpan, Segment, TokenLayout
from skipvision.model import attention_mask
from tests.skipvision.tiny import IMAGE, SKIPS, tiny_config

ANY = settings(max_examples=150, deadline=None, derandomize=True)
SPANS = st.builds(ImageSpan, st.integers(1, 4), st.integers(0, 4), st.integers(0, 2))
SEGMENTS = st.lists(st.integers(1, 4) | SPANS, max_size=6).map(tuple)
VISIBILITIES = st.sampled_from(["image", "all"])
LAYOUTS = st.builds(TokenLayout, SEGMENTS, VISIBILITIES)
Place = tuple[int, int | None, int]
"""Kind, number of the image, row of the table of text and visual rows."""


def places(segments: tuple[Segment, ...]) -> list[Place]:
    """Every row in attention order, spelled out."""
    num_ids = sum(segment if isinstance(segment, int) else 1 for segment in segments)
    rows: list[Place] = []
    text, visual, image = 0, num_ids, 0
    for segment in segments:
        if isinstance(segment, int):
            rows += [(TEXT, None, text + i) for i in range(segment)]
            text += segment
            continue
        kinds = [RETAINED] * segment.num_retained
        kinds += [SUMMARY] if segment.num_summary else []
        kinds += [SKIPPED] * segment.num_skipped
        kinds += [SUMMARY] if segment.num_summary == 2 else []
        rows += [(kind, image, visual + i) for i, kind in enumerate(kinds)]
        text, visual, image = text + 1, visual + len(kinds), image + 1
    return rows


def may_look(rows: list[Place], query: int, key: int, visibility: str) -> bool:
    hidden = rows[key][0] == SKIPPED and visibility == "image" and rows[query][1] != rows[key][1]
    return key <= query and not hidden


@ANY
@given(LAYOUTS)
def test_positions_are_a_permutation_with_the_kept_rows_first(layout: TokenLayout) -> None:
    rows, positions = places(layout.segments), layout.positions.tolist()
    assert sorted(positions) == list(range(len(rows)))
    kept, skipped = positions[: layout.num_kept], positions[layout.num_kept :]
    assert kept == sorted(kept)
    assert skipped == sorted(skipped)
    assert all(rows[place][0] != SKIPPED for place in kept)
    assert all(rows[place][0] == SKIPPED for place in skipped)


@ANY
@given(LAYOUTS)
def test_counts_add_up(layout: TokenLayout) -> None:
    rows = places(layout.segments)
    kinds = Counter(kind for kind, _, _ in rows)
    assert layout.kinds.tolist() == [kind for kind, _, _ in rows]
    assert layout.length == len(rows) == layout.num_kept + layout.num_skipped
    assert layout.num_skipped == kinds[SKIPPED]
    assert layout.num_kept == kinds[TEXT] + kinds[RETAINED] + kinds[SUMMARY]
    assert layout.num_ids == kinds[TEXT] + len(layout.images)
    assert sum(image.length for image in layout.images) == len(rows) - kinds[TEXT]
    assert sum(image.num_kept for image in layout.images) == kinds[RETAINED] + kinds[SUMMARY]


@ANY
@given(LAYOUTS)
def test_the_way_to_memory_and_back_loses_nothing(layout: TokenLayout) -> None:
    back = np.empty(layout.length, dtype=np.int64)
    back[layout.positions] = layout.source
    assert back.tolist() == [row for _, _, row in places(layout.segments)]


@ANY
@given(LAYOUTS)
def test_each_row_sees_what_the_rule_says(layout: TokenLayout) -> None:
    rows, positions = places(layout.segments), torch.from_numpy(layout.positions)[None]
    mask = attention_mask(positions, torch.from_numpy(layout.visible_until)[None])[0, 0]
    for one, query in enumerate(layout.positions):
        for other, key in enumerate(layout.positions):
            assert bool(mask[one, other]) == may_look(rows, int(query), int(key), layout.visibility)


@ANY
@given(st.lists(LAYOUTS.filter(lambda layout: layout.num_kept > 0), min_size=1, max_size=4), st.integers(0, 3))
def test_a_batch_pads_without_a_trace(layouts: list[TokenLayout], spare: int) -> None:
    width = max(layout.num_ids for layout in layouts) + spare
    batch = BatchLayout.of(layouts, width)
    assert batch.num_kept == max(layout.num_kept for layout in layouts)
    assert batch.kept_lengths.tolist() == [layout.num_kept for layout in layouts]
    assert batch.next_positions.tolist() == [layout.length for layout in layouts]
    mask = attention_mask(torch.from_numpy(batch.positions), torch.from_numpy(batch.visible_until))[:, 0]
    images = 0
    for row, layout in enumerate(layouts):
        real = [*range(layout.num_kept), *range(batch.num_kept, batch.num_kept + layout.num_skipped)]
        alone = attention_mask(torch.from_numpy(layout.positions)[None], torch.from_numpy(layout.visible_until)[None])
        assert torch.equal(mask[row][real][:, real], alone[0, 0])
        padding = sorted(set(range(mask.shape[1])) - set(real))
        assert not mask[row][:, padding].any(), "padding is attended to"
        assert mask[row].any(1).all(), "the softmax of a row that sees nothing is not a number"
        # The table holds the texts of all rows, then the pictures of all rows.
        before = len(layouts) * width + images
        expected = [
            row * width + source if source < layout.num_ids else before + source - layout.num_ids
            for source in layout.source.tolist()
        ]
        assert batch.source[row, real].tolist() == expected
        images += sum(image.length for image in layout.images)
    assert batch.source.min() >= 0
    assert batch.source.max() < len(layouts) * width + images


@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS.keys())
def test_ids_become_segments(skip: SkipConfig | None) -> None:
    config = tiny_config(skip)
    span = ImageSpan.of(config)
    visibility: Visibility = "image" if skip is None else skip.visibility
    layout = TokenLayout.of([9, 9, IMAGE, IMAGE, 9, IMAGE], IMAGE, config)
    assert layout == TokenLayout((2, span, span, 1, span), visibility)
    assert TokenLayout.of([9, 9], IMAGE, config).segments == (2,)
    assert TokenLayout.of([], IMAGE, config).segments == ()


def test_summaries_follow_what_is_skipped() -> None:
    assert ImageSpan.of(tiny_config(SkipConfig(5, 4))) == ImageSpan(5, 4, 2)
    assert ImageSpan.of(tiny_config(SkipConfig(5, 0))) == ImageSpan(5, 0, 1)
    assert ImageSpan.of(tiny_config(None)) == ImageSpan(16, 0, 0)
