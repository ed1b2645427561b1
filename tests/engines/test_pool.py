"""Sequences side by side answer as if each were alone, and none touches another's cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svcli_engines import onnx_engine
from svcli_engines.base import EngineError
from svcli_engines.onnx_engine import OnnxEngine, OnnxPool
from svcli_export.contract import CACHE_PARTS
from svcli_export.runtime import open_session
from tests.engines.conftest import Exported
from tests.engines.test_engines import IMAGE, PROMPTS, prefill

NUM_SLOTS = 4
Rows = list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]


@pytest.fixture(scope="module")
def shared_pool(exported: Exported) -> Iterator[OnnxPool]:
    pool = OnnxPool(exported.bundle, exported.manifest, num_threads=1, num_slots=NUM_SLOTS)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def shared_engines(exported: Exported) -> list[OnnxEngine]:
    return [exported.onnx_engine() for _ in range(NUM_SLOTS)]


@pytest.fixture
def pool(shared_pool: OnnxPool) -> OnnxPool:
    for slot in shared_pool.slots:
        slot.reset()
    return shared_pool


def cache(slot: Any) -> Rows:
    return [slot.cache_rows(layer, part) for layer in range(2) for part in CACHE_PARTS]


def fill(slot: Any, exported: Exported, num_rows: int) -> None:
    """Text up to so many rows."""
    prefill(slot, exported, [5 + number % 9 for number in range(num_rows)])


STEPS = st.lists(st.dictionaries(st.integers(0, NUM_SLOTS - 1), st.integers(2, 99)), min_size=1, max_size=6)


@settings(max_examples=15, deadline=None)
@given(steps=STEPS)
def test_a_step_over_any_slots_is_that_of_engines_of_their_own(
    exported: Exported, shared_pool: OnnxPool, shared_engines: list[OnnxEngine], steps: list[dict[int, int]]
) -> None:
    for number, ids in enumerate(list(PROMPTS.values())[:NUM_SLOTS]):
        for each in (shared_pool.slots[number], shared_engines[number]):
            prefill(each, exported, ids)
    for new_ids in steps:
        found = shared_pool.step(new_ids)
        assert found.keys() == new_ids.keys()
        for number, token in new_ids.items():
            np.testing.assert_allclose(found[number], shared_engines[number].extend([token]), atol=1e-4)
    for slot, engine in zip(shared_pool.slots, shared_engines, strict=True):
        assert (slot.length, slot.next_position) == (engine.length, engine.next_position)
        for rows, wanted in zip(cache(slot), cache(engine), strict=True):
            np.testing.assert_allclose(rows, wanted, atol=1e-4)


def test_rows_of_idle_slots_stay_as_they_are(exported: Exported, pool: OnnxPool) -> None:
    """Also of one that is full, behind which there is no row, and of one that is empty."""
    fill(pool.slots[0], exported, 3)
    fill(pool.slots[1], exported, pool.slots[1].capacity)
    fill(pool.slots[3], exported, pool.slots[3].capacity - 1)
    before, alone = cache(pool.slots[1]), exported.onnx_engine()
    fill(alone, exported, 3)
    for token in (6, 7, 8):
        found = pool.step({0: token})[0]
        np.testing.assert_allclose(found, alone.extend([token]), atol=1e-4)
    last = pool.step({3: 9, 0: 9})
    assert list(last) == [3, 0]
    np.testing.assert_allclose(last[0], alone.extend([9]), atol=1e-4)
    assert pool.slots[3].length == pool.slots[3].capacity
    for rows, wanted in zip(cache(pool.slots[1]), before, strict=True):
        np.testing.assert_array_equal(rows, wanted)
    assert pool.slots[2].length == 0


def test_a_slot_between_others_is_written_behind_its_length_alone(exported: Exported, pool: OnnxPool) -> None:
    for number in range(3):
        fill(pool.slots[number], exported, 4 + number)
    before = cache(pool.slots[1])
    memory = [buffer.numpy() for buffer in pool._shared.caches.values()]
    whole = [buffer.copy() for buffer in memory]
    pool.step({0: 7, 2: 8})
    for rows, wanted in zip(cache(pool.slots[1]), before, strict=True):
        np.testing.assert_array_equal(rows, wanted)
    for buffer, old in zip(memory, whole, strict=True):
        changed = np.argwhere((buffer != old).any(axis=(1, 3)))  # slot, row
        assert {tuple(each) for each in changed.tolist()} <= {(0, 4), (1, 5), (2, 6)}


def test_what_cannot_be_done_leaves_every_slot_as_it_was(exported: Exported, pool: OnnxPool) -> None:
    fill(pool.slots[0], exported, 3)
    fill(pool.slots[1], exported, pool.slots[1].capacity)
    before = [cache(slot) for slot in pool.slots]
    with pytest.raises(EngineError, match="do not fit"):
        pool.step({0: 5, 1: 5})
    with pytest.raises(EngineError, match="prefill first"):
        pool.step({0: 5, 2: 5})
    assert [slot.length for slot in pool.slots] == [3, pool.slots[1].capacity, 0, 0]
    for slot, rows in zip(pool.slots, before, strict=True):
        for found, wanted in zip(cache(slot), rows, strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert pool.step({}) == {}


def test_slots_are_prefilled_and_extended_one_by_one(exported: Exported, pool: OnnxPool) -> None:
    ids = [PROMPTS["two images"], PROMPTS["text only"], [IMAGE]]
    for slot, prompt in zip(pool.slots, ids, strict=False):
        prefill(slot, exported, prompt)
    for slot, prompt in zip(pool.slots, ids, strict=False):
        engine = exported.onnx_engine()
        prefill(engine, exported, prompt)
        np.testing.assert_array_equal(slot.extend([9, 10]), engine.extend([9, 10]))
        for rows, wanted in zip(cache(slot), cache(engine), strict=True):
            np.testing.assert_array_equal(rows, wanted)


def test_slots_share_graphs_and_lie_in_one_buffer(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    bound: dict[tuple[str, int], int] = {}

    def note_open(path: Path, **options: Any) -> ort.InferenceSession:
        opened.append(path.stem)
        return open_session(path, **options)

    def note(binding: ort.IOBinding, name: str, *place: Any) -> None:
        bound[name.replace("present", "past_key_values"), place[-2][0]] = place[-1]
        original[name.startswith("past")](binding, name, *place)

    original = {True: ort.IOBinding.bind_input, False: ort.IOBinding.bind_output}
    monkeypatch.setattr(ort.IOBinding, "bind_input", note)
    monkeypatch.setattr(ort.IOBinding, "bind_output", note)
    monkeypatch.setattr(onnx_engine, "open_session", note_open)
    pool = OnnxPool(exported.bundle, exported.manifest, num_threads=1, num_slots=3)
    for slot in pool.slots:
        prefill(slot, exported, PROMPTS["one image first"])
    pool.step({1: 5, 2: 6})
    assert sorted(opened) == ["decode", "prefill", "vision"]
    size = pool._shared.caches[1, "value"].numpy().nbytes // 3
    name = "past_key_values.1.value"
    start = pool._shared.caches[1, "value"].data_ptr()
    assert bound[name, 1] == start + 2 * size  # the last that was prefilled
    assert bound[name, 2] == start + size  # of the two that stepped, the first
    assert pool.slots[0].load_seconds == pool.slots[2].load_seconds > 0
    pool.slots[0].close()
    assert [slot.length for slot in pool.slots] == [0, 11, 11]
    pool.close()
    assert [slot.length for slot in pool.slots] == [0, 0, 0]
