"""Every engine's pool: whatever begins, goes on and ends in its slots, each answers as an engine of its own would."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from skipvision.checkpoint import load_checkpoint
from skipvision.layout import TokenLayout
from skipvision.model import SkipVisionModel
from svcli_engines import torch_steps
from svcli_engines.base import EngineError, MachineError
from svcli_engines.cuda import Cuda
from svcli_engines.onnx_engine import OnnxEngine, OnnxPool
from svcli_engines.plans import Backend, PlanError
from svcli_engines.slots import SlotPool, batch_sizes
from svcli_engines.tensorrt_engine import TensorRTEngine, TensorRTPool
from svcli_engines.torch_engine import TorchEngine, TorchPool
from svcli_export.contract import CACHE_PARTS
from tests.engines.conftest import Exported
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_tensorrt import FakeTensorRT, build_plans
from tests.engines.test_engines import PROMPTS, prefill

NUM_SLOTS = 4
KINDS = ["onnxruntime", "torch", "torch by steps", "tensorrt", "tensorrt-rtx"]
TOLERANCE = 1e-4
"""Of logits that reach 10, in fp32: what summing in another order does."""
AnyEngine = OnnxEngine | TorchEngine | TensorRTEngine
AnyPool = SlotPool[Any]


@dataclass
class Side:
    """A pool, and as many engines of the same kind."""

    pool: AnyPool
    alone: list[AnyEngine]
    cudas: list[FakeCuda]

    def close(self) -> None:
        self.pool.close()
        for engine in self.alone:
            engine.close()
        for cuda in self.cudas:
            cuda.check_released()


@pytest.fixture(scope="module")
def planned(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A bundle with plans for as many sequences as there are slots here."""
    bundle = Path(shutil.copytree(exported.bundle, tmp_path_factory.mktemp("planned") / "bundle"))
    for backend in ("tensorrt", "tensorrt-rtx"):
        build_plans(bundle, exported.manifest, "split", backend, num_sequences=NUM_SLOTS)
    return Exported(exported.checkpoint, bundle, exported.manifest)


def torch_pool(exported: Exported, **options: Any) -> TorchPool:
    capacity = exported.manifest.contract.capacity
    return TorchPool(load_checkpoint(exported.checkpoint), capacity=capacity, num_slots=NUM_SLOTS, **options)


def side(kind: str, planned: Exported) -> Side:
    bundle, manifest = planned.bundle, planned.manifest
    if kind == "onnxruntime":
        pool = OnnxPool(bundle, manifest, num_threads=1, num_slots=NUM_SLOTS)
        return Side(pool, [planned.onnx_engine() for _ in range(NUM_SLOTS)], [])
    if kind.startswith("torch"):
        made = torch_pool(planned, compiled=kind == "torch by steps")
        return Side(made, [planned.torch_engine() for _ in range(NUM_SLOTS)], [])
    backend: Backend = "tensorrt-rtx" if kind == "tensorrt-rtx" else "tensorrt"
    cudas = [FakeCuda(late=number % 2 == 0) for number in range(1 + NUM_SLOTS)]
    fakes = [
        {"backend": backend, "tensorrt": FakeTensorRT(each, rtx=kind != "tensorrt"), "cuda": each} for each in cudas
    ]
    engines: list[AnyEngine] = [TensorRTEngine(bundle, manifest, **fake) for fake in fakes[1:]]  # type: ignore[arg-type]
    return Side(TensorRTPool(bundle, manifest, **fakes[0]), engines, cudas)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=KINDS)
def sides(request: pytest.FixtureRequest, planned: Exported) -> Iterator[Side]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_steps, "compile_step", lambda step: step)  # which steps there are, and not the compiler
        made = side(request.param, planned)
        yield made
        made.close()


def assert_alike(pool: AnyPool, alone: list[AnyEngine]) -> None:
    """Lengths, positions, and every row of every cache."""
    for slot, engine in zip(pool.slots, alone, strict=True):
        assert (slot.length, slot.next_position) == (engine.length, engine.next_position)
        for layer in range(2):
            for part in CACHE_PARTS:
                rows, wanted = slot.cache_rows(layer, part), engine.cache_rows(layer, part)
                np.testing.assert_allclose(rows, wanted, atol=TOLERANCE)


SLOT = st.integers(0, NUM_SLOTS - 1)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), SLOT, st.sampled_from(list(PROMPTS))),
        st.tuples(st.just("end"), SLOT, st.just("")),
        st.tuples(st.just("fill"), SLOT, st.just("")),
        st.tuples(st.just("ask"), SLOT, st.just("")),
        st.tuples(st.just("step"), st.sets(SLOT), st.just("")),
        st.tuples(st.just("step"), st.sets(SLOT), st.just("")),
    ),
    min_size=4,
    max_size=14,
)


@settings(max_examples=12, deadline=None)
@given(actions=ACTIONS)
def test_answers_are_those_of_engines_of_their_own(sides: Side, planned: Exported, actions: list[Any]) -> None:
    """Greedy answers, begun, asked on, broken off and taken up in any order; a slot may be full."""
    pool, alone = sides.pool, sides.alone
    token = {}
    for number, each in enumerate((*pool.slots, *alone)):
        each.reset()
        token[number % NUM_SLOTS] = 5
    for action, which, prompt in [("begin", 0, "one image first"), ("begin", 3, "text only"), *actions]:
        if action == "step":
            new_ids = {n: token[n] for n in sorted(which) if 0 < pool.slots[n].length < pool.slots[n].capacity}
            found = pool.step(new_ids)
            assert list(found) == list(new_ids)
            pairs = [(n, found[n], alone[n].extend([new_ids[n]])) for n in new_ids]
        elif action == "end":
            pool.slots[which].reset()
            alone[which].reset()
            continue
        elif action == "begin":
            pairs = [(which, *(prefill(each, planned, PROMPTS[prompt]) for each in (pool.slots[which], alone[which])))]
        else:
            room = pool.slots[which].capacity - pool.slots[which].length
            ids = [7] * (room if action == "fill" else min(room, 3))
            if not ids or not pool.slots[which].length:
                continue
            pairs = [(which, pool.slots[which].extend(ids), alone[which].extend(ids))]
        for number, logits, wanted in pairs:
            np.testing.assert_allclose(logits, wanted, atol=TOLERANCE)
            token[number] = int(wanted.argmax())
    assert_alike(pool, alone)


def test_what_cannot_be_done_leaves_every_slot_as_it_was(sides: Side, planned: Exported) -> None:
    pool, alone = sides.pool, sides.alone
    for each in (*pool.slots, *alone):
        each.reset()
    for each in (pool.slots[0], alone[0]):
        prefill(each, planned, PROMPTS["two images"])
    for each in (pool.slots[1], alone[1]):
        prefill(each, planned, [5] * pool.slots[1].capacity)
    with pytest.raises(EngineError, match="do not fit"):
        pool.step({0: 5, 1: 5})
    with pytest.raises(EngineError, match="prefill first"):
        pool.step({0: 5, 2: 5})
    assert pool.step({}) == {}
    assert_alike(pool, alone)


def test_width_is_what_a_step_computes(sides: Side, planned: Exported) -> None:
    pool = sides.pool
    for slot in pool.slots:
        slot.reset()
    whole = [1, 2, 4, 4] if pool._recorded else [1, 1, 1, 1]
    assert [pool.width([number]) for number in range(4)] == whole
    assert pool.width([1, 3]) == (4 if pool._recorded else 3)
    assert pool.width([]) == 0
    prefill(pool.slots[2], planned, [5] * pool.slots[2].capacity)  # which no step may touch
    assert pool.width([1, 3]) == 2


def test_sizes_are_powers_of_two_and_the_pool_itself() -> None:
    assert [batch_sizes(n) for n in (1, 2, 3, 4, 6, 8)] == [
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 4),
        (1, 2, 4, 6),
        (1, 2, 4, 8),
    ]


# PyTorch


def test_torch_steps_over_several_slots_become_graphs(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: graphs are the operations of one step, on the very tensors they had, and nothing of Python's."""
    monkeypatch.setattr(torch_steps, "compile_step", lambda step: step)
    pool, alone = torch_pool(exported, compiled=True), [exported.torch_engine() for _ in range(NUM_SLOTS)]
    for step in pool._shared.steps.values():
        step.mode = "warming up"

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        cache = pool._shared.cache
        tensors = [*cache.keys, *cache.values]
        counts = [
            each for made in pool._shared.steps.values() for each in (made._cache.lengths, made._cache.next_positions)
        ]
        before = [tensor.clone() for tensor in (*tensors, *counts)]
        traced: Callable[[], None] = make_fx(lambda: step())()
        for tensor, value in zip((*tensors, *counts), before, strict=True):  # a capture runs nothing
            tensor.copy_(value)
        return traced

    monkeypatch.setattr(torch_steps, "capture", capture)
    for number, prompt in enumerate(list(PROMPTS.values())[:NUM_SLOTS]):
        for each in (pool.slots[number], alone[number]):
            prefill(each, exported, prompt)
    for round_number in range(5):
        for numbers in ([0], [1], [0, 3], [2, 1, 0]):
            new_ids = dict.fromkeys(numbers, 5 + round_number)
            for number, logits in pool.step(new_ids).items():
                np.testing.assert_allclose(logits, alone[number].extend([new_ids[number]]), atol=TOLERANCE)
    assert pool.decode_modes == {1: "graph", 2: "graph", 4: "graph"}
    assert_alike(pool, list(alone))
    pool.close()


def test_torch_asks_for_memory_before_it_takes_it(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 10, 1 << 30))
    monkeypatch.setattr(SkipVisionModel, "to", lambda model, *_places: model)
    with pytest.raises(
        MachineError, match=r"of 4 sequences take 1 MiB and the GPU has 0 MiB free; run fewer at a time"
    ):
        torch_pool(exported, device="cuda", precision="fp16")
    with pytest.raises(MachineError, match=r"of a sequence take 1 MiB and the GPU has 0 MiB free; end what else uses"):
        exported.engine_of_checkpoint(device="cuda", precision="fp16")


# TensorRT


def tensorrt_pool(planned: Exported, cuda: FakeCuda, **options: Any) -> TensorRTPool:
    return TensorRTPool(planned.bundle, planned.manifest, tensorrt=FakeTensorRT(cuda), cuda=cuda, **options)


def test_tensorrt_has_a_graph_for_each_power_of_two(planned: Exported) -> None:
    cuda = FakeCuda()
    fake = FakeTensorRT(cuda)
    pool = TensorRTPool(planned.bundle, planned.manifest, tensorrt=fake, cuda=cuda)
    for slot in pool.slots:
        prefill(slot, planned, PROMPTS["text only"])
    for numbers, size in (([0], 1), ([0, 1], 2), ([1], 2), ([0, 1, 2], 4), ([0, 3], 4)):
        fake.runs.clear()
        for _ in range(4):
            cuda.calls.clear()
            pool.step(dict.fromkeys(numbers, 5))
        assert set(fake.runs) == {("decode", size)}
        assert cuda.calls == ["cudaGraphLaunch", "cudaStreamSynchronize"]
    assert pool.decode_modes == {1: "graph", 2: "graph", 4: "graph"}
    pool.close()
    cuda.check_released()


def test_tensorrt_goes_around_a_slot_that_is_full(planned: Exported) -> None:
    """Without a graph, on the neighbours that are left."""
    cuda = FakeCuda()
    fake = FakeTensorRT(cuda)
    pool, alone = TensorRTPool(planned.bundle, planned.manifest, tensorrt=fake, cuda=cuda), planned.onnx_engine()
    prefill(pool.slots[0], planned, [5] * pool.slots[0].capacity)
    full = pool.slots[0].cache_rows(1, "value")
    for each in (pool.slots[1], pool.slots[3], alone):
        prefill(each, planned, PROMPTS["one image last"])
    fake.runs.clear()
    found = pool.step({3: 6, 1: 6})
    assert fake.runs == [("decode", 3)]
    wanted = alone.extend([6])
    for number in (1, 3):
        np.testing.assert_allclose(found[number], wanted, atol=TOLERANCE)
    np.testing.assert_allclose(pool.step({3: 7})[3], alone.extend([7]), atol=TOLERANCE)
    assert fake.runs[1:] == [("decode", 1)]
    np.testing.assert_array_equal(pool.slots[0].cache_rows(1, "value"), full)
    pool.close()


def test_a_cache_that_could_not_be_bound_is_bound_again(planned: Exported) -> None:
    cuda = FakeCuda()
    fake = FakeTensorRT(cuda)
    pool = TensorRTPool(planned.bundle, planned.manifest, tensorrt=fake, cuda=cuda)
    ids = PROMPTS["text only"]
    prefill(pool.slots[0], planned, ids)
    before = pool.slots[0].cache_rows(0, "key")
    fake.refuses.add("address")
    with pytest.raises(EngineError, match=r"refused the address of past_key_values\.0\.key"):
        prefill(pool.slots[2], planned, ids)
    fake.refuses.clear()
    prefill(pool.slots[2], planned, [9, 9, *ids])
    np.testing.assert_array_equal(pool.slots[0].cache_rows(0, "key"), before)
    np.testing.assert_allclose(pool.step({0: 6})[0], _extended(planned, ids), atol=TOLERANCE)
    pool.close()


def _extended(planned: Exported, ids: list[int]) -> Any:
    engine = planned.onnx_engine()
    prefill(engine, planned, ids)
    return engine.extend([6])


def test_fewer_slots_than_the_plans_are_for_take_less_memory(planned: Exported) -> None:
    sizes = []
    for num_slots in (1, 2, None):
        cuda = FakeCuda()
        pool = tensorrt_pool(planned, cuda, num_slots=num_slots)
        assert len(pool.slots) == (num_slots or NUM_SLOTS)
        sizes.append(sum(map(len, cuda.blocks.values())))
        pool.close()
    contract = planned.manifest.contract
    slot = contract.capacity * contract.kv_bytes_per_row
    assert slot <= sizes[1] - sizes[0] < 2 * slot
    assert 2 * slot <= sizes[2] - sizes[1] < 3 * slot


def test_plans_for_fewer_name_the_command(planned: Exported) -> None:
    cuda = FakeCuda()
    with pytest.raises(PlanError) as refusal:
        tensorrt_pool(planned, cuda, num_slots=9)
    assert "built for 4 sequences at a time, and 9 are asked for; build them again with `svcli build" in str(
        refusal.value
    )
    assert str(refusal.value).endswith("--target sm_89 --sequences 9`")
    cuda.check_released()


@pytest.mark.parametrize("layout", ["split", "shared"])
def test_plans_for_one_are_a_pool_of_one(exported: Exported, tmp_path: Path, layout: Any) -> None:
    bundle = Path(shutil.copytree(exported.bundle, tmp_path / "bundle"))
    build_plans(bundle, exported.manifest, layout)
    single = Exported(exported.checkpoint, bundle, exported.manifest)
    cuda = FakeCuda()
    pool, alone = tensorrt_pool(single, cuda), exported.onnx_engine()
    for each in (pool.slots[0], alone):
        prefill(each, exported, PROMPTS["two images"])
    for token in (5, 6, 7, 8):
        np.testing.assert_allclose(pool.step({0: token})[0], alone.extend([token]), atol=TOLERANCE)
    pool.close()
    with pytest.raises(
        PlanError, match=r"built for 1 sequence at a time, and 2 are asked for; .* sm_89 --sequences 2`"
    ):
        tensorrt_pool(single, FakeCuda(), num_slots=2)


def test_memory_that_is_not_there_is_one_sentence(planned: Exported) -> None:
    contract = planned.manifest.contract
    cuda = FakeCuda(memory=3 * contract.capacity * contract.kv_bytes_per_row)
    with pytest.raises(MachineError, match=r"KV cache and scratch memory of 4 sequences take .* run fewer at a time"):
        tensorrt_pool(planned, cuda)
    assert "cudaMalloc" not in cuda.calls
    cuda.check_released()


def test_a_stale_row_of_another_slot_is_caught(planned: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above would find: a slot that is prefilled in the place of its neighbour."""
    cuda = FakeCuda()
    pool = tensorrt_pool(planned, cuda)
    prefill(pool.slots[0], planned, PROMPTS["text only"])
    monkeypatch.setattr(type(pool._plans), "_cache_addresses", lambda plans, _slot: plans._caches)
    prefill(pool.slots[1], planned, PROMPTS["one image first"])
    found = pool.step({0: 6})[0]
    assert not np.allclose(found, _extended(planned, PROMPTS["text only"]), atol=TOLERANCE)
    pool.close()


def test_one_slot_is_a_pool_too(planned: Exported) -> None:
    pools: list[AnyPool] = [
        OnnxPool(planned.bundle, planned.manifest, num_threads=1, num_slots=1),
        tensorrt_pool(planned, FakeCuda(), num_slots=1),
    ]
    for pool in pools:
        ids = PROMPTS["text only"]
        pool.slots[0].prefill(ids, None, TokenLayout.of(ids, 1, planned.manifest.config))
        np.testing.assert_allclose(pool.step({0: 6})[0], _extended(planned, ids), atol=TOLERANCE)
        pool.close()


def test_nothing_is_left_after_a_failure_of_the_gpu(planned: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    pool = tensorrt_pool(planned, cuda)
    for slot in pool.slots:
        prefill(slot, planned, PROMPTS["text only"])
    lengths = [slot.length for slot in pool.slots]
    with monkeypatch.context() as patch:
        patch.setattr(Cuda, "synchronize", lambda _cuda: (_ for _ in ()).throw(EngineError("the device is gone")))
        with pytest.raises(EngineError, match="gone"):
            pool.step({0: 5, 2: 5})
    assert [slot.length for slot in pool.slots] == lengths
    pool.close()
    cuda.check_released()
