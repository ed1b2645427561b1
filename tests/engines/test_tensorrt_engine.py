"""The TensorRT engine on a fake GPU: right answers, the order of calls, and what happens when something fails.

The fake runs the bundle's graphs in ONNX Runtime on the addresses that the engine binds, so a split plan must answer
as the onnx engine does to the last bit; a shared plan sums over the same rows in another order.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from skipvision.layout import TokenLayout
from svcli_engines.base import Engine, EngineError, MachineError, Pixels, Visual
from svcli_engines.cuda import Cuda, CudaError
from svcli_engines.generate import Conversation, Piece
from svcli_engines.plans import Backend, EngineLayout, PlanError, PlanSet
from svcli_engines.plugins.compile import cache_folder
from svcli_engines.sampling import Sampling
from svcli_engines.tensorrt_engine import TensorRTEngine
from svcli_engines.tensorrt_phases import OpenPlans
from svcli_engines.tensorrt_runtime import Phase, TensorRT
from svcli_export.contract import CACHE_PARTS
from tests.engines import fake_tensorrt
from tests.engines.conftest import Exported, export_tiny
from tests.engines.fake_cuda import CAPTURE_INVALIDATED, FAILED, NO_DRIVER, OUT_OF_MEMORY, FakeCuda, Fault
from tests.engines.fake_tensorrt import SCRATCH, TARGET, Context, Edit, FakeTensorRT, build_plans
from tests.export.tiny import IMAGE_SIZE

Floats = npt.NDArray[np.float32]

IMAGE = 1
PROMPTS = {
    "text only": [2, 7, 8, 3],
    "one image first": [IMAGE, 2, 7, 8, 3],
    "one image last": [2, 7, 8, IMAGE],
    "two images": [IMAGE, 2, 7, IMAGE, 8, 3],
}
QUESTION = [9, 10, 11, 12, 13]
NUM_STEPS = 6
TOLERANCES = {"fp32": 1e-4, "fp16": 0.03}
"""Of logits that reach 10, in a shared plan: what summing in another order does in this precision."""


@dataclass
class Rig:
    """An engine, and the fakes below it."""

    engine: TensorRTEngine
    cuda: FakeCuda
    tensorrt: FakeTensorRT

    def calls(self, action: Callable[[], object]) -> list[str]:
        """Names of the CUDA functions that `action` calls."""
        before = len(self.cuda.calls)
        action()
        return self.cuda.calls[before:]

    def contexts(self) -> dict[str, list[Context]]:
        """By the graph of their plan."""
        found: dict[str, list[Context]] = {}
        for context in self.tensorrt.contexts:
            found.setdefault(Path(context.engine.plan["graph"]).stem, []).append(context)
        return found


@pytest.fixture(scope="session")
def exported_fp16(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("fp16"), precision="fp16")


@pytest.fixture(scope="session")
def bundles(
    exported: Exported, exported_plain: Exported, exported_fp16: Exported, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, EngineLayout], Exported]:
    """A bundle with plans of both backends, by name and layout."""
    sources = {"skip": exported, "plain": exported_plain, "skip in fp16": exported_fp16}

    @cache
    def bundle_of(kind: str, layout: EngineLayout) -> Exported:
        source = sources[kind]
        bundle = Path(shutil.copytree(source.bundle, tmp_path_factory.mktemp("plans") / "bundle"))
        for backend in ("tensorrt", "tensorrt-rtx"):
            build_plans(bundle, source.manifest, layout, backend)
        return Exported(source.checkpoint, bundle, source.manifest)

    return bundle_of


@pytest.fixture
def skip(bundles: Callable[[str, EngineLayout], Exported]) -> Exported:
    return bundles("skip", "split")


def start(exported: Exported, *, late: bool = True, rtx: bool = False, memory: int = 1 << 30) -> Rig:
    cuda = FakeCuda(late=late, memory=memory)
    tensorrt = FakeTensorRT(cuda, rtx=rtx)
    return Rig(make(exported, cuda, tensorrt), cuda, tensorrt)


def make(exported: Exported, cuda: FakeCuda, tensorrt: FakeTensorRT) -> TensorRTEngine:
    backend: Backend = "tensorrt-rtx" if tensorrt.rtx else "tensorrt"
    return TensorRTEngine(exported.bundle, exported.manifest, backend=backend, tensorrt=tensorrt, cuda=cuda)


def edited(exported: Exported, folder: Path, edit: Edit, layout: EngineLayout = "split") -> Exported:
    """The bundle with plans that were built in another way."""
    bundle = Path(shutil.copytree(exported.bundle, folder / "bundle"))
    build_plans(bundle, exported.manifest, layout, edit=edit)
    return Exported(exported.checkpoint, bundle, exported.manifest)


def pixels(count: int) -> Pixels:
    return np.random.default_rng(count).standard_normal((count, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)


def prefill(engine: Engine, exported: Exported, ids: list[int]) -> Floats:
    layout = TokenLayout.of(ids, IMAGE, exported.manifest.config)
    visual = engine.encode(pixels(len(layout.images))) if layout.images else None
    return engine.prefill(ids, visual, layout)


def two_turns(engine: Engine, exported: Exported, ids: list[int]) -> tuple[list[int], Floats]:
    """Greedy tokens and all logits: a prompt, an answer, a question of several ids, an answer."""
    logits = [prefill(engine, exported, ids)]
    tokens: list[int] = []
    for turn in range(2):
        if turn == 1:
            logits.append(engine.extend(QUESTION))
        for _ in range(NUM_STEPS):
            tokens.append(int(logits[-1].argmax()))
            logits.append(engine.extend(tokens[-1:]))
    return tokens, np.stack(logits)


@pytest.mark.parametrize("late", [True, False], ids=["late", "at once"])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("layout", ["split", "shared"])
@pytest.mark.parametrize("kind", ["skip", "plain", "skip in fp16"])
def test_answers_are_those_of_the_onnx_engine(
    bundles: Callable[[str, EngineLayout], Exported], kind: str, layout: EngineLayout, prompt: str, late: bool
) -> None:
    exported = bundles(kind, layout)
    rig = start(exported, late=late)
    tokens, logits = two_turns(rig.engine, exported, PROMPTS[prompt])
    expected_tokens, expected = two_turns(exported.onnx_engine(), exported, PROMPTS[prompt])
    tolerance = 0.0 if layout == "split" else TOLERANCES[exported.manifest.contract.precision]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)
    assert logits.dtype == np.float32
    assert tokens == expected_tokens
    assert rig.engine.decode_mode == "graph"
    rig.engine.close()
    rig.cuda.check_released()


def test_conversation_with_a_picture_is_that_of_the_onnx_engine(skip: Exported) -> None:
    answers = []
    for engine in (skip.onnx_engine(), start(skip).engine):
        conversation = Conversation(engine, skip.processor)
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
        for images in ([picture], []):
            sampling = Sampling(max_new_tokens=8, temperature=2.0, seed=1)
            events = list(conversation.ask("what is this?", images, sampling))
            answers.append("".join(event.text for event in events if isinstance(event, Piece)))
    assert answers[:2] == answers[2:]
    assert all(answers)


@pytest.mark.parametrize("rtx", [False, True], ids=["tensorrt", "tensorrt-rtx"])
def test_single_ids_become_a_graph_after_the_warm_up(skip: Exported, rtx: bool) -> None:
    rig = start(skip, rtx=rtx)
    prefill(rig.engine, skip, PROMPTS["one image first"])
    assert rig.engine.name == f"tensorrt{'-rtx' if rtx else ''}-{TARGET}"
    for _ in range(2):
        assert rig.engine.decode_mode == "warming up"
        assert "cudaGraphLaunch" not in rig.calls(lambda: rig.engine.extend([5]))
    assert "cudaStreamBeginCapture" in rig.calls(lambda: rig.engine.extend([5]))
    assert rig.engine.decode_mode == "graph"
    assert rig.calls(lambda: rig.engine.extend([5])) == ["cudaGraphLaunch", "cudaStreamSynchronize"]
    assert "cudaGraphLaunch" not in rig.calls(lambda: rig.engine.extend([5, 6]))
    prefill(rig.engine, skip, PROMPTS["text only"])
    assert rig.calls(lambda: rig.engine.extend([5])) == ["cudaGraphLaunch", "cudaStreamSynchronize"]


def test_everything_is_allocated_at_the_start(skip: Exported) -> None:
    rig = start(skip)
    calls = rig.calls(lambda: two_turns(rig.engine, skip, PROMPTS["two images"]))
    assert not {"cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithFlags"} & set(calls)


def test_one_wait_a_call(skip: Exported) -> None:
    rig = start(skip)
    layout = TokenLayout.of(PROMPTS["text only"], IMAGE, skip.manifest.config)
    actions: list[Callable[[], object]] = [
        lambda: rig.engine.encode(pixels(2)),
        lambda: rig.engine.prefill(PROMPTS["text only"], None, layout),
        lambda: rig.engine.extend(QUESTION),
        lambda: rig.engine.extend([5]),
    ]
    for action in actions:
        assert rig.calls(action).count("cudaStreamSynchronize") == 1


def test_prompt_without_pictures_copies_none(skip: Exported) -> None:
    rig = start(skip)
    layout = TokenLayout.of(PROMPTS["text only"], IMAGE, skip.manifest.config)
    none = Visual(np.zeros((0, 12, 32), np.float32))
    expected = rig.engine.prefill(PROMPTS["text only"], None, layout)
    for visual in (None, none):
        calls = rig.calls(partial(rig.engine.prefill, PROMPTS["text only"], visual, layout))
        assert calls.count("cudaMemcpyAsync") == 5 + 1  # ids, source, positions, visibility, kept rows; logits
        np.testing.assert_array_equal(rig.engine.prefill(PROMPTS["text only"], visual, layout), expected)


@pytest.mark.parametrize("layout", ["split", "shared"])
def test_contexts_share_scratch_memory_and_the_cache(
    bundles: Callable[[str, EngineLayout], Exported], layout: EngineLayout
) -> None:
    rig = start(bundles("skip", layout))
    contexts = [context for group in rig.contexts().values() for context in group]
    assert len(contexts) == 4
    assert {context.scratch for context in contexts} == {
        (
            contexts[0].scratch[0],
            max(
                SCRATCH[file]
                for file in (
                    ("vision.plan", "prefill.plan", "decode.plan")
                    if layout == "split"
                    else ("vision.plan", "decoder.plan")
                )
            ),
        ),
    }
    decoders = [context for context in contexts if "logits" in context.addresses]
    assert len(decoders) == 3
    for layer in range(2):
        for part in ("key", "value"):
            past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
            assert len({context.addresses[name] for context in decoders for name in (past, present)}) == 1
    assert len({address for name, address in decoders[0].addresses.items() if name.startswith("past")}) == 4
    profiles = sorted(context.profile or 0 for context in decoders)
    assert profiles == ([0, 0, 0] if layout == "split" else [0, 1, 1])
    assert len({id(context.engine) for context in decoders}) == (2 if layout == "split" else 1)


def test_a_longer_prompt_before_leaves_no_trace(skip: Exported) -> None:
    engine = start(skip).engine
    fresh = prefill(engine, skip, PROMPTS["text only"]), engine.extend(QUESTION)
    prefill(engine, skip, PROMPTS["two images"])
    engine.extend(QUESTION)
    again = prefill(engine, skip, PROMPTS["text only"]), engine.extend(QUESTION)
    np.testing.assert_array_equal(fresh, again)


def test_results_are_not_overwritten_by_the_next_run(skip: Exported) -> None:
    engine = start(skip).engine
    visual = engine.encode(pixels(1))
    logits = prefill(engine, skip, PROMPTS["one image first"])
    kept = visual.rows.copy(), logits.copy()
    engine.encode(pixels(2))
    engine.extend(QUESTION)
    np.testing.assert_array_equal(visual.rows, kept[0])
    np.testing.assert_array_equal(logits, kept[1])


def test_cache_fills_to_the_last_row_and_no_further(skip: Exported) -> None:
    engine, onnx_engine = start(skip).engine, skip.onnx_engine()
    for each in (engine, onnx_engine):
        prefill(each, skip, PROMPTS["two images"])
    rest = [5] * (engine.capacity - engine.length)
    np.testing.assert_array_equal(engine.extend(rest), onnx_engine.extend(rest))
    assert engine.length == engine.capacity == onnx_engine.capacity
    assert engine.kv_bytes_per_row == onnx_engine.kv_bytes_per_row
    with pytest.raises(EngineError, match="do not fit"):
        engine.extend([5])


def test_misuse_is_refused(skip: Exported) -> None:
    engine = start(skip).engine
    with pytest.raises(EngineError, match="prefill first"):
        engine.extend([5])
    with pytest.raises(EngineError, match="pictures of 12 rows and 0 rows were given"):
        engine.prefill([IMAGE, 5], None, TokenLayout.of([IMAGE, 5], IMAGE, skip.manifest.config))
    prefill(engine, skip, PROMPTS["text only"])
    engine.reset()
    assert engine.length == 0
    with pytest.raises(EngineError, match="prefill first"):
        engine.extend([5])


@pytest.mark.parametrize("kind", ["skip", "plain", "skip in fp16"])
def test_a_shared_decoder_takes_a_picture_behind_what_was_said(
    bundles: Callable[[str, EngineLayout], Exported], kind: str
) -> None:
    exported = bundles(kind, "shared")
    engine, onnx_engine = start(exported).engine, exported.onnx_engine()
    later = [IMAGE, 2, 7]
    layout = TokenLayout.of(later, IMAGE, exported.manifest.config)
    logits = []
    for each in (engine, onnx_engine):
        assert each.can_append
        prefill(each, exported, PROMPTS["one image last"])
        each.extend(QUESTION)
        logits.append([each.append(later, each.encode(pixels(1)), layout), each.extend([5])])
        length, position = each.length, each.next_position
        each.extend([6, 7])
        each.rewind(length, position)
        logits[-1].append(each.extend([8]))
    assert (engine.length, engine.next_position) == (onnx_engine.length, onnx_engine.next_position)
    tolerance = TOLERANCES[exported.manifest.contract.precision]
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=tolerance)


def test_a_prefill_of_its_own_begins_with_an_empty_cache(skip: Exported) -> None:
    engine = start(skip).engine
    assert not engine.can_append
    layout = TokenLayout.of(PROMPTS["text only"], IMAGE, skip.manifest.config)
    appended = engine.append(PROMPTS["text only"], None, layout)  # behind nothing
    with pytest.raises(EngineError, match="with the first prompt alone, and 4 rows are in the cache"):
        engine.append(PROMPTS["text only"], None, layout)
    assert engine.length == 4
    np.testing.assert_array_equal(engine.prefill(PROMPTS["text only"], None, layout), appended)


def test_retained_tokens_are_those_of_the_onnx_engine(skip: Exported, tmp_path: Path) -> None:
    for most in (1, 2):
        engine = start(edited(skip, tmp_path / str(most), set_largest("vision.plan", "pixels", 0, most))).engine
        told, expected = (each.encode(pixels(2)).retained for each in (engine, skip.onnx_engine()))
        assert expected is not None
        assert told is not None
        assert told.dtype == np.int64
        np.testing.assert_array_equal(told, expected)


def set_largest(file: str, name: str, place: int, size: int) -> Edit:
    """Lowers what one dimension of an input may be."""

    def edit(this: str, plan: dict[str, Any]) -> None:
        if this == file:
            for which in plan["profiles"][0][name]:
                which[place] = min(which[place], size)

    return edit


def test_cache_can_be_read(bundles: Callable[[str, EngineLayout], Exported]) -> None:
    exported = bundles("skip in fp16", "split")
    engine, onnx_engine = start(exported).engine, exported.onnx_engine()
    for each in (engine, onnx_engine):
        prefill(each, exported, PROMPTS["one image first"])
        each.extend(QUESTION)
    for layer in range(2):
        for part in CACHE_PARTS:
            rows = engine.cache_rows(layer, part)
            assert rows.shape == (2, engine.length, 8)
            np.testing.assert_array_equal(rows, onnx_engine.cache_rows(layer, part))


def test_long_questions_are_cut_to_what_the_plan_takes(skip: Exported, tmp_path: Path) -> None:
    rig = start(edited(skip, tmp_path, set_largest("decode.plan", "input_ids", 1, 2)))
    prefill(rig.engine, skip, PROMPTS["text only"])
    rig.tensorrt.runs.clear()
    logits = rig.engine.extend(QUESTION)
    assert rig.tensorrt.runs == [("decode", 2), ("decode", 2), ("decode", 1)]
    onnx_engine = skip.onnx_engine()
    prefill(onnx_engine, skip, PROMPTS["text only"])
    np.testing.assert_allclose(logits, onnx_engine.extend(QUESTION), atol=1e-5)


def test_pictures_are_encoded_in_as_many_runs_as_it_takes(skip: Exported, tmp_path: Path) -> None:
    rig = start(edited(skip, tmp_path, set_largest("vision.plan", "pixels", 0, 1)))
    visual = rig.engine.encode(pixels(2))
    assert rig.tensorrt.runs == [("vision", 1), ("vision", 1)]
    np.testing.assert_allclose(visual.rows, skip.onnx_engine().encode(pixels(2)).rows, atol=1e-5)


def test_prompt_that_the_plan_does_not_take_is_refused(skip: Exported, tmp_path: Path) -> None:
    engine = start(edited(skip, tmp_path, set_largest("prefill.plan", "input_ids", 1, 3))).engine
    with pytest.raises(
        PlanError, match=r"prefill.plan takes input_ids of \[1, 1\] to \[1, 3\], not \[1, 4\].*svcli bu"
    ):
        prefill(engine, skip, PROMPTS["text only"])
    assert engine.length == 0


# What does not fit


def tensor(file: str, name: str, **values: Any) -> Edit:
    def edit(this: str, plan: dict[str, Any]) -> None:
        if this == file:
            plan["tensors"][name].update(values)

    return edit


def renamed(file: str, old: str, new: str) -> Edit:
    def edit(this: str, plan: dict[str, Any]) -> None:
        if this == file:
            plan["tensors"][new] = plan["tensors"].pop(old)

    return edit


def copied(file: str, present: str) -> Edit:
    def edit(this: str, plan: dict[str, Any]) -> None:
        if this == file:
            del plan["aliases"][present]

    return edit


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (renamed("prefill.plan", "source", "zebra"), "prefill.plan lacks the tensor source"),
        (renamed("prefill.plan", "source", "apple"), "prefill.plan has the unknown tensor apple"),
        (tensor("decode.plan", "input_ids", dtype="int32"), "input_ids as another type [1, -1] instead of int64"),
        (tensor("decode.plan", "logits", shape=[1, 7]), "logits as float32 [1, 7] instead of float32 [1, 300]"),
        (tensor("vision.plan", "visual", mode="INPUT"), "vision.plan does not have visual as output"),
        (tensor("decode.plan", "write_index", location="HOST"), "decode.plan wants write_index outside the GPU"),
        (copied("decode.plan", "present.1.value"), "decode.plan does not write past_key_values.1.value in place"),
    ],
)
def test_plan_that_is_not_the_contracts_is_refused(skip: Exported, tmp_path: Path, edit: Edit, problem: str) -> None:
    bundle = edited(skip, tmp_path, edit)
    cuda = FakeCuda()
    with pytest.raises(PlanError) as refusal:
        make(bundle, cuda, FakeTensorRT(cuda))
    assert problem in str(refusal.value)
    assert "svcli build-engine" in str(refusal.value)
    cuda.check_released()


def test_plans_of_another_version_are_refused_before_they_are_loaded(skip: Exported) -> None:
    cuda = FakeCuda()
    with pytest.raises(PlanError, match=r"11\.0\.0 is installed"):
        make(skip, cuda, FakeTensorRT(cuda, version="11.0.0"))
    cuda.check_released()


def test_gpu_without_plans_names_the_command(skip: Exported) -> None:
    cuda = FakeCuda(capability=(12, 0))
    with pytest.raises(PlanError, match="no plans of tensorrt for sm_120; build them with `svcli build-engine"):
        make(skip, cuda, FakeTensorRT(cuda))
    cuda.check_released()


def test_altered_plan_is_refused_unless_the_check_is_left_out(skip: Exported, tmp_path: Path) -> None:
    bundle = edited(skip, tmp_path, lambda _file, _plan: None)
    path = PlanSet(bundle.bundle, "tensorrt", TARGET).folder / "decode.plan"
    path.write_bytes(b"?" * path.stat().st_size)
    cuda = FakeCuda()
    tensorrt = FakeTensorRT(cuda)
    with pytest.raises(PlanError, match=r"decode.plan was altered"):
        make(bundle, cuda, tensorrt)
    with pytest.raises(PlanError, match=r"cannot read decode.plan \(magicTag assertion failed\); build them again"):
        TensorRTEngine(bundle.bundle, bundle.manifest, check_files=False, tensorrt=tensorrt, cuda=FakeCuda())


# What fails


@pytest.mark.parametrize(
    ("refused", "problem"),
    [
        ("memory", r"too little free memory for vision.plan; .* \(OutOfMemory"),
        ("context", r"made no execution context \(no context today\)"),
        ("start", r"could not be started \(no driver today\)"),
        ("profile", r"TensorRT refused profile 0 \(profile refused\)"),
        ("address", r"refused the address of pixels \(address refused\)"),
        ("shape", r"refused input_ids of \[1, 1\] \(shape refused\)"),
    ],
)
def test_refusals_of_tensorrt_at_the_start_are_one_sentence(skip: Exported, refused: str, problem: str) -> None:
    cuda = FakeCuda()
    tensorrt = FakeTensorRT(cuda)
    tensorrt.refuses.add(refused)
    with pytest.raises(EngineError, match=problem):
        make(skip, cuda, tensorrt)
    cuda.check_released()
    assert not tensorrt.contexts


def test_run_that_tensorrt_refuses_is_one_sentence(skip: Exported) -> None:
    rig = start(skip)
    rig.tensorrt.refuses.add("run")
    with pytest.raises(EngineError, match=r"could not run prefill.plan \(run refused\)"):
        prefill(rig.engine, skip, PROMPTS["text only"])
    rig.tensorrt.refuses.clear()
    prefill(rig.engine, skip, PROMPTS["text only"])


@pytest.mark.parametrize(
    ("function", "code", "problem"),
    [
        ("cudaDeviceGetAttribute", NO_DRIVER, "driver is missing, or older than .*; see what `svcli doctor` says"),
        ("cudaDeviceGetAttribute", 100, "no NVIDIA GPU was found"),
        ("cudaStreamCreateWithFlags", FAILED, r"failed while making a stream: what 719 means \(cudaError719\)"),
        ("cudaMalloc", OUT_OF_MEMORY, r"too little free memory \(allocating \d+ bytes\)"),
        ("cudaHostAlloc", OUT_OF_MEMORY, r"too little free memory \(allocating \d+ bytes of host memory\)"),
        ("cudaMemsetAsync", FAILED, "failed while clearing memory"),
        ("cudaStreamSynchronize", FAILED, "failed while waiting for the GPU"),
    ],
)
def test_cuda_errors_at_the_start_are_one_sentence(skip: Exported, function: str, code: int, problem: str) -> None:
    cuda = FakeCuda()
    cuda.failures[function] = code
    with pytest.raises(CudaError if code == FAILED else MachineError, match=problem):
        make(skip, cuda, FakeTensorRT(cuda))
    assert not cuda.blocks


def test_too_little_memory_for_the_buffers_gives_everything_back(skip: Exported) -> None:
    cuda = FakeCuda(memory=12_000)  # scratch memory, and little more
    with pytest.raises(MachineError, match="end what else uses it"):
        make(skip, cuda, FakeTensorRT(cuda))
    cuda.check_released()


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("cudaMemcpyAsync", "copying 32 bytes"),
        ("cudaStreamSynchronize", "waiting for the GPU"),
    ],
)
def test_cuda_errors_in_a_run_are_one_sentence(skip: Exported, function: str, problem: str) -> None:
    rig = start(skip)
    prefill(rig.engine, skip, PROMPTS["text only"])
    rig.cuda.failures[function] = FAILED
    with pytest.raises(CudaError, match=f"failed while {problem}"):
        prefill(rig.engine, skip, PROMPTS["text only"])
    assert rig.engine.length == 0  # what was in the cache is gone


def test_failed_launch_is_one_sentence(skip: Exported) -> None:
    rig = start(skip)
    two_turns(rig.engine, skip, PROMPTS["text only"])
    length = rig.engine.length
    rig.cuda.failures["cudaGraphLaunch"] = FAILED
    with pytest.raises(CudaError, match="launching a graph"):
        rig.engine.extend([5])
    assert rig.engine.length == length


@pytest.mark.parametrize(
    ("function", "refused", "reason"),
    [
        ("cudaStreamBeginCapture", "", "CUDA failed while starting a capture"),
        ("cudaMemcpyAsync", "", "CUDA failed while copying 8 bytes"),
        ("", "capture", "TensorRT could not run decode.plan (capture refused)"),
        ("cudaStreamEndCapture", "", "CUDA failed while ending a capture"),
        ("cudaGraphInstantiate", "", "CUDA failed while making a graph"),
        ("", "capturable", "TensorRT cannot record this plan"),
    ],
)
def test_without_a_graph_decoding_goes_on(
    skip: Exported, monkeypatch: pytest.MonkeyPatch, function: str, refused: str, reason: str
) -> None:
    rig = start(skip, rtx=refused == "capturable")
    rig.tensorrt.refuses.add(refused)
    begin, abandon = Cuda.begin_capture, Cuda.abandon_capture

    def fail_from_here(cuda: Cuda) -> None:
        rig.cuda.failures[function] = CAPTURE_INVALIDATED
        begin(cuda)

    def succeed_from_here(cuda: Cuda) -> None:
        rig.cuda.failures.clear()
        abandon(cuda)

    monkeypatch.setattr(Cuda, "begin_capture", fail_from_here)
    monkeypatch.setattr(Cuda, "abandon_capture", succeed_from_here)
    tokens, logits = two_turns(rig.engine, skip, PROMPTS["one image first"])
    assert rig.engine.decode_mode.startswith(f"eager: {reason}")
    assert "cudaGraphLaunch" not in rig.cuda.calls
    assert rig.cuda.calls.count("cudaStreamBeginCapture") == (refused != "capturable")
    expected_tokens, expected = two_turns(skip.onnx_engine(), skip, PROMPTS["one image first"])
    np.testing.assert_array_equal(logits, expected)
    assert tokens == expected_tokens
    rig.engine.close()
    rig.cuda.check_released()


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_in_a_capture_leaves_a_stream_that_runs(skip: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = start(skip)
    ids = PROMPTS["text only"]
    prefill(rig.engine, skip, ids)
    for token in (5, 6):
        rig.engine.extend([token])
    submit = OpenPlans._submit
    monkeypatch.setattr(OpenPlans, "_submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rig.engine.extend([7])
    assert "cudaStreamBeginCapture" in rig.cuda.calls
    monkeypatch.setattr(OpenPlans, "_submit", submit)
    np.testing.assert_array_equal(prefill(rig.engine, skip, ids), prefill(skip.onnx_engine(), skip, ids))
    rig.engine.close()
    rig.cuda.check_released()


def test_nothing_is_freed_while_the_gpu_still_works(skip: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Ctrl-C between a run and its end."""
    rig = start(skip)
    monkeypatch.setattr(OpenPlans, "_finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prefill(rig.engine, skip, PROMPTS["text only"])
    contexts = len(rig.tensorrt.contexts)
    waited: list[int] = []
    synchronize = rig.cuda.cudaStreamSynchronize

    def wait(stream: int) -> Any:
        waited.append(len(rig.tensorrt.contexts))
        return synchronize(stream)

    monkeypatch.setattr(rig.cuda, "cudaStreamSynchronize", wait)
    rig.engine.close()
    assert waited[0] == contexts > 0
    rig.cuda.check_released()


def test_kernels_that_rtx_compiled_are_kept_for_the_next_start(skip: Exported, tmp_path: Path) -> None:
    bundle = Exported(skip.checkpoint, Path(shutil.copytree(skip.bundle, tmp_path / "bundle")), skip.manifest)
    build_plans(bundle.bundle, bundle.manifest, "split", "tensorrt-rtx")
    ids = PROMPTS["one image first"]
    compiled = []
    for damage in (None, None, b"damaged", None):
        if damage is not None:
            (kept,) = cache_folder().glob("tensorrt-rtx-sm_89-*.bin")
            kept.write_bytes(damage)
        rig = start(bundle, rtx=True)
        two_turns(rig.engine, bundle, ids)
        rig.engine.close()
        compiled.append(sorted(set(rig.tensorrt.kernels)))
    everything = ["alone", "decode", "vision"]  # a prefill of its own
    assert compiled == [everything, [], everything, []]
    assert [path.name for path in cache_folder().iterdir()] == [kept.name]
    # The same plans built anew have other kernels.
    build_plans(bundle.bundle, bundle.manifest, "split", "tensorrt-rtx", edit=lambda _, plan: plan.update(scratch=9500))
    rig = start(bundle, rtx=True)
    two_turns(rig.engine, bundle, ids)
    assert rig.tensorrt.kernels


def test_a_cache_that_cannot_be_written_is_no_failure(
    skip: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Exported(skip.checkpoint, Path(shutil.copytree(skip.bundle, tmp_path / "bundle")), skip.manifest)
    build_plans(bundle.bundle, bundle.manifest, "split", "tensorrt-rtx")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    rig = start(bundle, rtx=True)
    two_turns(rig.engine, bundle, PROMPTS["text only"])
    rig.engine.close()
    rig.cuda.check_released()


def test_tensorrt_proper_keeps_no_kernels(skip: Exported) -> None:
    rig = start(skip)
    prefill(rig.engine, skip, PROMPTS["text only"])
    rig.engine.close()
    assert not cache_folder().exists()


def test_close_frees_everything_once(skip: Exported) -> None:
    rig = start(skip)
    two_turns(rig.engine, skip, PROMPTS["one image first"])
    with pytest.raises(Fault, match="device memory, host memory, streams, graphs"):
        rig.cuda.check_released()
    rig.engine.close()
    rig.cuda.check_released()
    assert not rig.tensorrt.contexts  # plans are held by their contexts alone
    assert not rig.calls(rig.engine.close)


# Nothing installed


def test_modules_are_those_installed(skip: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(cuda))
    engine = TensorRTEngine(skip.bundle, skip.manifest)
    assert engine.load_seconds > 0
    engine.close()
    cuda.check_released()


def test_missing_packages_are_named(skip: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MachineError, match=r"cuda-bindings is needed .*: pip install cuda-bindings"):
        TensorRTEngine(skip.bundle, skip.manifest)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MachineError, match=r"tensorrt is not installed: install TensorRT 10.15"):
        TensorRTEngine(skip.bundle, skip.manifest, cuda=FakeCuda())
    with pytest.raises(EngineError, match="tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13"):
        TensorRTEngine(skip.bundle, skip.manifest, backend="tensorrt-rtx", cuda=FakeCuda())


def test_bindings_without_their_libraries_are_named(
    skip: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(EngineError, match=r"tensorrt cannot be loaded \(libnvinfer.so.10: cannot open"):
        TensorRTEngine(skip.bundle, skip.manifest, cuda=FakeCuda())


# Planted faults: the fake notices what a GPU would not tell


def differs_from_onnx(rig: Rig, exported: Exported) -> bool:
    _, logits = two_turns(rig.engine, exported, PROMPTS["one image first"])
    _, expected = two_turns(exported.onnx_engine(), exported, PROMPTS["one image first"])
    return not np.allclose(logits, expected, atol=TOLERANCES["fp32"])


def test_stale_cache_row_is_caught(skip: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = TensorRTEngine._decode_feeds

    def one_row_too_far(engine: TensorRTEngine, ids: list[int], first: int) -> dict[str, Any]:
        return {**feeds(engine, ids, first), "write_index": np.array([engine.length + 1], np.int64)}

    assert not differs_from_onnx(start(skip), skip)
    monkeypatch.setattr(TensorRTEngine, "_decode_feeds", one_row_too_far)
    assert differs_from_onnx(start(skip), skip)


def test_missing_wait_is_caught(skip: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = start(skip)
    monkeypatch.setattr(Cuda, "synchronize", lambda _cuda: None)
    assert np.isnan(prefill(rig.engine, skip, PROMPTS["text only"])).all()


def test_input_changed_after_its_copy_was_enqueued_is_caught(skip: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = start(skip)
    expected = prefill(rig.engine, skip, PROMPTS["text only"])
    enqueue = Phase.enqueue

    def enqueue_and_tidy_up(phase: Phase) -> None:
        enqueue(phase)
        rig.engine._plans._buffers["input_ids"].host[...] = 0

    monkeypatch.setattr(Phase, "enqueue", enqueue_and_tidy_up)
    assert not np.allclose(prefill(rig.engine, skip, PROMPTS["text only"]), expected, atol=TOLERANCES["fp32"])


def test_cache_that_is_not_cleared_is_caught(skip: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_tensorrt, "_session", fake_tensorrt.whole_buffers)
    engine = start(skip).engine
    prefill(engine, skip, PROMPTS["text only"])
    assert np.isfinite(engine.extend([5])).all()
    monkeypatch.setattr(FakeCuda, "cudaMemsetAsync", lambda *_arguments: (0,))
    engine = start(skip).engine
    prefill(engine, skip, PROMPTS["text only"])
    assert np.isnan(engine.extend([5])).any()


@pytest.mark.parametrize(
    ("name", "offset", "problem"),
    [
        ("present.0.key", 256, "present.0.key lies elsewhere"),
        ("logits", 256, r"bytes at 256 of a block"),
        ("input_ids", 1 << 40, "no memory was allocated"),
    ],
)
def test_wrong_address_is_caught(
    skip: Exported, monkeypatch: pytest.MonkeyPatch, name: str, offset: int, problem: str
) -> None:
    bind = Phase.bind

    def bind_beside(phase: Phase, addresses: dict[str, int]) -> None:
        bind(phase, {**addresses, name: addresses[name] + offset})

    monkeypatch.setattr(Phase, "bind", bind_beside)
    with pytest.raises(Fault, match=problem):
        prefill(start(skip).engine, skip, PROMPTS["text only"])


@pytest.mark.parametrize(("forgotten", "problem"), [("set_shapes", "the shape of input_ids"), ("bind", "the address")])
def test_what_was_not_set_is_caught(
    skip: Exported, monkeypatch: pytest.MonkeyPatch, forgotten: str, problem: str
) -> None:
    monkeypatch.setattr(Phase, forgotten, lambda _phase, _values: None)
    with pytest.raises(EngineError, match=f"{problem}.* was not set"):
        prefill(start(skip).engine, skip, PROMPTS["text only"])


def test_scratch_memory_that_is_too_small_is_caught(skip: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    context = TensorRT.context

    def short_of_scratch(
        tensorrt: TensorRT, engine: Any, profile: int, scratch: tuple[int, int], *, captured: bool
    ) -> Any:
        return context(tensorrt, engine, profile, (scratch[0], scratch[1] - 1), captured=captured)

    monkeypatch.setattr(TensorRT, "context", short_of_scratch)
    with pytest.raises(Fault, match="8999 bytes of scratch memory instead of 9000"):
        prefill(start(skip).engine, skip, PROMPTS["text only"])


def test_context_that_changes_behind_its_graph_is_caught(skip: Exported) -> None:
    rig = start(skip)
    two_turns(rig.engine, skip, PROMPTS["text only"])
    rig.engine._plans.steps[1].phase.set_shapes({"input_ids": (1, 2), "position_ids": (1, 2), "write_index": (1,)})
    with pytest.raises(Fault, match="context has changed"):
        rig.engine.extend([5])


def test_capture_without_a_warm_up_is_caught(skip: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svcli_engines.tensorrt_phases._WARM_UP", 0)
    rig = start(skip)
    prefill(rig.engine, skip, PROMPTS["text only"])
    rig.engine.extend([5])
    assert "a capture before the first run" in rig.engine.decode_mode


def test_allocating_breaks_a_capture() -> None:
    cuda = FakeCuda()
    wrapper = Cuda(cuda)
    wrapper.begin_capture()
    with pytest.raises(CudaError, match=r"allocating 64 bytes: what 900 means"):
        wrapper.allocate(64)
    with pytest.raises(CudaError, match=r"ending a capture: what 901 means"):
        wrapper.end_capture()
    wrapper.abandon_capture()
    assert wrapper.allocate(64)


def test_memory_that_was_freed_is_caught() -> None:
    cuda = FakeCuda()
    wrapper = Cuda(cuda)
    address, host = wrapper.allocate(64), wrapper.allocate_host(64)
    wrapper.to_device(address, host)
    with pytest.raises(Fault, match="freed while the stream works"):
        cuda.cudaFree(address)
    wrapper.close()
    with pytest.raises(Fault, match="no memory was allocated"):
        cuda.memory(address, 1)
    with pytest.raises(Fault, match="not pinned"):
        cuda.cudaMemcpyAsync(address, host.ctypes.data, 64, 1, wrapper.stream)
