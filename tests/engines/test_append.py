"""A prompt that comes in parts leaves what the whole leaves; a cache that is cut back is one that never held more."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision.config import SkipConfig
from skipvision.layout import TokenLayout
from svcli_engines.base import Engine, EngineError, Logits, together
from svcli_engines.onnx_engine import OnnxEngine
from svcli_engines.torch_engine import TorchEngine
from svcli_export.contract import CACHE_PARTS
from tests.engines.conftest import Exported, export_tiny
from tests.engines.test_engines import IMAGE, pixels
from tests.export.tiny import drawn, resampler_config

CONVERSATION = [2, 7, IMAGE, 8, 3, 9, IMAGE, 10, 11]
Reader = OnnxEngine | TorchEngine

Cache = list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]


def engine_of(exported: Exported, kind: str) -> Reader:
    return exported.onnx_engine() if kind == "onnx" else exported.torch_engine()


@pytest.fixture(scope="module", params=["onnx", "torch"])
def engine(request: pytest.FixtureRequest, exported: Exported) -> Reader:
    return engine_of(exported, request.param)


@pytest.fixture(scope="module", params=["onnx", "torch"])
def plain(request: pytest.FixtureRequest, exported_plain: Exported) -> Reader:
    return engine_of(exported_plain, request.param)


def put(engine: Engine, exported: Exported, ids: Sequence[int], first_picture: int = 0, *, behind: bool) -> Logits:
    """Prefills or appends ids; the pictures in them are those from `first_picture` on."""
    layout = TokenLayout.of(ids, IMAGE, exported.manifest.config)
    all_pixels = pixels(2)[first_picture : first_picture + len(layout.images)]
    visual = together([engine.encode(each[None]) for each in all_pixels])
    return (engine.append if behind else engine.prefill)(ids, visual, layout)


def in_parts(engine: Engine, exported: Exported, ids: Sequence[int], cuts: set[int]) -> Logits:
    bounds = [0, *sorted(cuts), len(ids)]
    engine.reset()
    for start, end in itertools.pairwise(bounds):
        logits = put(engine, exported, ids[start:end], ids[:start].count(IMAGE), behind=True)
    return logits


def state(engine: Reader) -> tuple[int, int, Cache]:
    rows = [engine.cache_rows(layer, part) for layer in range(2) for part in CACHE_PARTS]
    return engine.length, engine.next_position, rows


def assert_same(found: tuple[int, int, Cache], expected: tuple[int, int, Cache], tolerance: float = 1e-4) -> None:
    assert found[:2] == expected[:2]
    for rows, wanted in zip(found[2], expected[2], strict=True):
        np.testing.assert_allclose(rows, wanted, atol=tolerance)


SPLITS = st.sets(st.integers(1, len(CONVERSATION) - 1))


@settings(max_examples=12, deadline=None)
@given(cuts=SPLITS)
def test_appending_any_parts_equals_prefilling_the_whole(exported: Exported, engine: Reader, cuts: set[int]) -> None:
    """Exact but for the order of sums: skipped rows are seen by their own picture alone."""
    whole = put(engine, exported, CONVERSATION, behind=False)
    expected = state(engine)
    assert engine.next_position == engine.length + 2 * 6  # skipped rows keep their positions
    np.testing.assert_allclose(in_parts(engine, exported, CONVERSATION, cuts), whole, atol=1e-4)
    assert_same(state(engine), expected)


@settings(max_examples=5, deadline=None)
@given(cuts=SPLITS)
def test_a_plain_model_takes_parts_too(exported_plain: Exported, plain: Reader, cuts: set[int]) -> None:
    whole = put(plain, exported_plain, CONVERSATION, behind=False)
    expected = state(plain)
    np.testing.assert_allclose(in_parts(plain, exported_plain, CONVERSATION, cuts), whole, atol=1e-4)
    assert_same(state(plain), expected)


def test_where_all_see_skipped_rows_a_picture_goes_behind_text_exactly(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """And text behind a picture does not: it no longer sees the rows that were evicted."""
    exported = export_tiny(tmp_path_factory.mktemp("all"), SkipConfig(4, 6, visibility="all"))
    for engine in (exported.onnx_engine(), exported.torch_engine()):
        ids = CONVERSATION[:5]
        whole = put(engine, exported, ids, behind=False)
        np.testing.assert_allclose(in_parts(engine, exported, ids, {2}), whole, atol=1e-4)
        assert not np.allclose(in_parts(engine, exported, ids, {3}), whole, atol=1e-2)


def test_engines_agree_on_what_is_appended(exported: Exported) -> None:
    logits = [in_parts(each, exported, CONVERSATION, {4}) for each in (exported.onnx_engine(), exported.torch_engine())]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def test_appending_text_is_extending_by_it(exported: Exported, engine: Reader) -> None:
    put(engine, exported, CONVERSATION[:4], behind=False)
    extended = engine.extend([5, 6, 7])
    expected = state(engine)
    put(engine, exported, CONVERSATION[:4], behind=False)
    np.testing.assert_allclose(put(engine, exported, [5, 6, 7], behind=True), extended, atol=1e-4)
    assert_same(state(engine), expected)


@pytest.mark.parametrize("kept", [1, 4, 6, 8])
def test_going_on_from_a_rewound_cache_is_going_on_from_a_fresh_one(
    exported: Exported, engine: Reader, kept: int
) -> None:
    ids, new = CONVERSATION[:kept], [20, 21, 22]
    put(engine, exported, ids, behind=False)
    rows, position = engine.length, engine.next_position
    fresh = engine.extend(new)
    expected = state(engine)
    put(engine, exported, CONVERSATION, behind=False)
    engine.extend([30, 31])
    engine.rewind(rows, position)
    assert (engine.length, engine.next_position) == (rows, position)
    np.testing.assert_allclose(engine.extend(new), fresh, atol=1e-4)
    assert_same(state(engine), expected)


def test_a_cache_is_rewound_no_further_than_it_goes(exported: Exported, engine: Reader) -> None:
    put(engine, exported, [5, 6, 7], behind=False)
    for rows in (4, -1):
        with pytest.raises(EngineError, match=f"holds 3 rows, not {rows}"):
            engine.rewind(rows, rows)
    assert (engine.length, engine.next_position) == (3, 3)
    engine.rewind(0, 0)
    with pytest.raises(EngineError, match="prefill first"):
        engine.extend([5])


def test_what_does_not_fit_behind_the_cache_changes_nothing(exported: Exported, engine: Reader) -> None:
    put(engine, exported, CONVERSATION, behind=False)
    before = state(engine)
    too_many = [5] * (engine.capacity - engine.length + 1)
    with pytest.raises(EngineError, match=f"{len(too_many)} rows does not fit behind {engine.length} in a KV cache"):
        put(engine, exported, too_many, behind=True)
    with pytest.raises(EngineError, match="do not fit"):
        engine.extend(too_many)
    with pytest.raises(EngineError, match="does not fit in a KV cache"):
        put(engine, exported, [5] * (engine.capacity + 1), behind=False)
    with pytest.raises(EngineError, match="pictures of 12 rows and 0 rows were given"):
        engine.append([IMAGE], None, TokenLayout.of([IMAGE], IMAGE, exported.manifest.config))
    assert_same(state(engine), before, tolerance=0)


def test_a_bundle_has_no_positions_beyond_its_own(exported: Exported) -> None:
    engine = exported.onnx_engine()
    put(engine, exported, [5], behind=False)
    most = exported.manifest.contract.max_positions
    engine.rewind(1, most - 1)
    engine.extend([6])
    with pytest.raises(EngineError, match=f"up to position {most + 1} do not fit {most} positions"):
        engine.extend([6])
    with pytest.raises(EngineError, match="positions"):
        put(engine, exported, [6], behind=True)


@pytest.mark.parametrize(
    "skip",
    [SkipConfig(4, 6), SkipConfig(4, 0), SkipConfig(4, 6, selector="uniform")],
    ids=["skip", "drop", "uniform"],
)
def test_what_was_retained_is_told_as_the_model_chose_it(
    skip: SkipConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    exported = export_tiny(tmp_path_factory.mktemp("retained"), skip)
    engines: list[Engine] = [exported.onnx_engine(), exported.torch_engine()]
    told = [engine.encode(pixels(3)).retained for engine in engines]
    assert told[0] is not None
    assert told[1] is not None
    assert told[0].dtype == np.int64
    np.testing.assert_array_equal(told[0], told[1])
    assert told[0].shape == (3, 4)
    assert (np.diff(told[0], axis=1) > 0).all()
    if skip.selector == "uniform":
        assert told[0].tolist() == [[0, 4, 8, 12]] * 3
    else:
        assert len({tuple(row) for row in told[0].tolist()}) == 3  # each picture has its own


def test_where_nothing_is_chosen_nothing_is_told(exported_plain: Exported) -> None:
    for engine in (exported_plain.onnx_engine(), exported_plain.torch_engine()):
        assert engine.encode(pixels(2)).retained is None
    first = drawn(resampler_config(SkipConfig(11, 8, selector="first", num_unpooled=3)))
    views = np.zeros((2, 3, 32, 32), np.float32)
    assert TorchEngine(first, capacity=64).encode(views).retained is None
