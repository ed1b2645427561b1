"""The onnx engine answers as the torch engine does, whatever the prompt and however it is cut."""

from __future__ import annotations

import itertools
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from skipvision.layout import TokenLayout
from svcli_engines import onnx_engine, torch_steps
from svcli_engines.base import Engine, EngineError, MachineError, Pixels
from svcli_engines.onnx_engine import OnnxEngine
from svcli_engines.torch_engine import TorchEngine, TorchPrecision
from svcli_export.contract import CACHE_PARTS
from svcli_export.runtime import ProviderError, open_session
from tests.engines.conftest import Exported
from tests.export.tiny import IMAGE_SIZE
from tests.optional import missing
from tests.plugins.cpu_device import host_compiler

IMAGE = 1
NEW = [9, 10, 11, 12, 13]
PROMPTS = {
    "text only": [2, 7, 8, 3],
    "one image first": [IMAGE, 2, 7, 8, 3],
    "one image last": [2, 7, 8, IMAGE],
    "two images": [IMAGE, 2, 7, IMAGE, 8, 3],
    "nothing but an image": [IMAGE],
}


def pixels(count: int) -> Pixels:
    return np.random.default_rng(count).standard_normal((count, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)


def prefill(engine: Engine, exported: Exported, ids: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    layout = TokenLayout.of(ids, IMAGE, exported.manifest.config)
    visual = engine.encode(pixels(len(layout.images))) if layout.images else None
    return engine.prefill(ids, visual, layout)


@pytest.mark.parametrize("ids", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("fixture", ["exported", "exported_plain"])
def test_onnx_equals_torch(request: pytest.FixtureRequest, fixture: str, ids: list[int]) -> None:
    exported: Exported = request.getfixturevalue(fixture)
    engine, reference = exported.onnx_engine(), exported.torch_engine()
    np.testing.assert_allclose(prefill(engine, exported, ids), prefill(reference, exported, ids), atol=1e-4)
    for step in (NEW[:3], NEW[3:4]):
        np.testing.assert_allclose(engine.extend(step), reference.extend(step), atol=1e-4)
        assert engine.length == reference.length


@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, len(NEW) - 1)))
def test_extend_is_the_same_for_any_split(exported: Exported, cuts: set[int]) -> None:
    engine = exported.onnx_engine()
    ids = PROMPTS["one image first"]
    prefill(engine, exported, ids)
    whole = engine.extend(NEW)
    prefill(engine, exported, ids)
    bounds = [0, *sorted(cuts), len(NEW)]
    for start, end in itertools.pairwise(bounds):
        logits = engine.extend(NEW[start:end])
    np.testing.assert_allclose(logits, whole, atol=1e-5)


def test_prefill_of_more_text_equals_extending_by_it(exported: Exported) -> None:
    engine, ids = exported.onnx_engine(), PROMPTS["one image first"]
    whole = prefill(engine, exported, ids + NEW)
    prefill(engine, exported, ids)
    np.testing.assert_allclose(engine.extend(NEW), whole, atol=1e-4)


def test_a_longer_prompt_before_leaves_no_trace(exported: Exported) -> None:
    engine = exported.onnx_engine()
    fresh = prefill(engine, exported, PROMPTS["text only"]), engine.extend(NEW)
    prefill(engine, exported, PROMPTS["two images"])
    engine.extend(NEW)
    again = prefill(engine, exported, PROMPTS["text only"]), engine.extend(NEW)
    np.testing.assert_array_equal(fresh, again)


def test_only_surviving_rows_are_counted(exported: Exported) -> None:
    engine = exported.onnx_engine()
    prefill(engine, exported, PROMPTS["two images"])
    assert engine.length == 4 + 2 * (4 + 2)  # text, then retained and two summaries of each image
    engine.extend(NEW)
    assert engine.length == 4 + 2 * (4 + 2) + len(NEW)


def test_caches_are_written_in_place(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: dict[str, int] = {}

    def note(binding: ort.IOBinding, name: str, *place: Any) -> None:
        bound[name] = place[-1]
        original[name.startswith("past")](binding, name, *place)

    original = {True: ort.IOBinding.bind_input, False: ort.IOBinding.bind_output}
    monkeypatch.setattr(ort.IOBinding, "bind_input", note)
    monkeypatch.setattr(ort.IOBinding, "bind_output", note)
    engine = exported.onnx_engine()
    addresses = []
    for _ in range(2):
        prefill(engine, exported, PROMPTS["text only"])
        engine.extend(NEW)
        addresses.append(dict(bound))
    assert addresses[0] == addresses[1]
    for layer in range(2):
        for part in ("key", "value"):
            assert bound[f"past_key_values.{layer}.{part}"] == bound[f"present.{layer}.{part}"]
    assert len({bound[name] for name in bound if name.startswith("past")}) == 4


def test_cache_fills_to_the_last_row_and_no_further(exported: Exported) -> None:
    engine, reference = exported.onnx_engine(), exported.torch_engine()
    ids = PROMPTS["two images"]
    prefill(engine, exported, ids)
    prefill(reference, exported, ids)
    rest = [5] * (engine.capacity - engine.length)
    np.testing.assert_allclose(engine.extend(rest), reference.extend(rest), atol=1e-4)
    assert engine.length == engine.capacity
    with pytest.raises(EngineError, match="do not fit"):
        engine.extend([5])


def test_graphs_are_opened_when_needed(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def note(path: Path, **options: Any) -> ort.InferenceSession:
        opened.append(path.stem)
        return open_session(path, **options)

    monkeypatch.setattr(onnx_engine, "open_session", note)
    engine = exported.onnx_engine()
    prefill(engine, exported, PROMPTS["text only"])
    assert opened == ["prefill"]
    engine.extend(NEW)
    engine.extend(NEW)
    assert opened == ["prefill", "decode"]
    prefill(engine, exported, PROMPTS["one image first"])
    assert opened == ["prefill", "decode", "vision"]
    assert engine.load_seconds > 0


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_misuse_is_refused(exported: Exported, kind: str) -> None:
    engine: Engine = exported.onnx_engine() if kind == "onnx" else exported.torch_engine()
    layout = TokenLayout.of([IMAGE, 5], IMAGE, exported.manifest.config)
    with pytest.raises(EngineError, match="prefill first"):
        engine.extend([5])
    with pytest.raises(EngineError, match="pictures of 12 rows and 0 rows were given"):
        engine.prefill([IMAGE, 5], None, layout)
    too_long = [5] * (engine.capacity + 1)
    with pytest.raises(EngineError, match="does not fit"):
        engine.prefill(too_long, None, TokenLayout.of(too_long, IMAGE, exported.manifest.config))
    engine.prefill([5], None, TokenLayout.of([5], IMAGE, exported.manifest.config))
    with pytest.raises(EngineError, match="0 new rows"):
        engine.extend([])
    engine.reset()
    assert engine.length == 0
    with pytest.raises(EngineError, match="prefill first"):
        engine.extend([5])


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.04), ("bf16", 0.2)])
def test_torch_in_half_precision_stays_near_fp32(
    exported: Exported, precision: TorchPrecision, tolerance: float
) -> None:
    """Logits reach 9, of which fp16 keeps one part in 2048 and bf16 one in 256, over some ten products in a row.

    Of text, since of patches that are nearly as good as each other bf16 may choose another one.
    """
    engine, reference = exported.engine_of_checkpoint(precision=precision), exported.torch_engine()
    assert np.isfinite(prefill(engine, exported, PROMPTS["two images"])).all()
    for each in (engine, reference):
        prefill(each, exported, PROMPTS["text only"])
    logits, expected = engine.extend(NEW), reference.extend(NEW)
    assert logits.dtype == np.float32
    assert (engine.precision, 2 * engine.kv_bytes_per_row) == (precision, reference.kv_bytes_per_row)
    np.testing.assert_allclose(logits, expected, atol=tolerance)
    assert not np.array_equal(logits, expected)


def test_torch_by_the_weights_of_a_bundle_is_that_of_its_checkpoint(exported: Exported) -> None:
    engines = exported.torch_engine(), TorchEngine.of_bundle(exported.bundle, exported.manifest)
    logits = [(prefill(engine, exported, PROMPTS["two images"]), engine.extend(NEW)) for engine in engines]
    np.testing.assert_array_equal(logits[0], logits[1])
    for part in CACHE_PARTS:
        np.testing.assert_array_equal(engines[0].cache_rows(1, part), engines[1].cache_rows(1, part))
        assert engines[0].cache_rows(1, part).shape == (2, engines[0].length, 8)


def capture_by_tracing(engine: TorchEngine) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """A CUDA graph on the CPU: the operations of one step, on the very tensors they had, and nothing of Python's."""

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        cache, counts = engine._shared.cache, engine._shared.steps[1]._cache
        tensors = [*cache.keys, *cache.values, counts.lengths, counts.next_positions]
        before = [tensor.clone() for tensor in tensors]
        traced = make_fx(lambda: step())()
        for tensor, value in zip(tensors, before, strict=True):  # a capture runs nothing
            tensor.copy_(value)
        return traced

    return capture


def with_graphs(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> TorchEngine:
    """The engine as it is on CUDA."""
    engine._shared.steps[1].mode = "warming up"
    monkeypatch.setattr(torch_steps, "capture", capture_by_tracing(engine))
    return engine


def test_torch_decodes_by_a_graph_what_it_decodes_without(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, reference = with_graphs(exported.torch_engine(), monkeypatch), exported.torch_engine()
    modes = []
    for ids in (PROMPTS["two images"], PROMPTS["text only"]):
        np.testing.assert_array_equal(prefill(engine, exported, ids), prefill(reference, exported, ids))
        for step in ([5], [6], [7], [8], [9, 10], [11], [12]):
            logits = engine.extend(step)
            np.testing.assert_array_equal(logits, reference.extend(step))
            kept = logits.copy()
            modes.append(engine.decode_mode)
        assert engine.length == reference.length
        engine.reset()
    assert modes == ["warming up"] * 2 + ["graph"] * 12
    prefill(engine, exported, PROMPTS["text only"])
    engine.extend([5])
    np.testing.assert_array_equal(logits, kept)  # results are not overwritten by the next step
    engine.close()
    assert engine.length == 0


def test_torch_without_a_graph_says_why_and_goes_on(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, reference = with_graphs(exported.torch_engine(), monkeypatch), exported.torch_engine()

    def refuse(_step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    monkeypatch.setattr(torch_steps, "capture", refuse)
    for ids in (PROMPTS["one image first"], PROMPTS["text only"]):
        np.testing.assert_array_equal(prefill(engine, exported, ids), prefill(reference, exported, ids))
        for token in NEW:
            np.testing.assert_array_equal(engine.extend([token]), reference.extend([token]))
    assert engine.decode_mode == "eager: operation not permitted when stream is capturing"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports its compiler
def test_torch_decodes_compiled_what_it_decodes_as_written(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By TorchInductor itself, as on CUDA, but for the kernels' language."""
    has_headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    if host_compiler() is None or not has_headers or " " in torch.__file__:  # which it hands on without quotes
        missing("inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    engine, reference = exported.engine_of_checkpoint(compiled=True), exported.torch_engine()
    for ids in (PROMPTS["two images"], PROMPTS["text only"]):
        np.testing.assert_array_equal(prefill(engine, exported, ids), prefill(reference, exported, ids))
        for step in ([5], [6], [7, 8], [9]):
            np.testing.assert_allclose(engine.extend(step), reference.extend(step), atol=1e-5)
        for part in CACHE_PARTS:
            np.testing.assert_allclose(engine.cache_rows(1, part), reference.cache_rows(1, part), atol=1e-5)
    assert engine.code == "compiled"
    (code,) = (path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.py") if "def call" in path.read_text())
    assert "scatter" not in code  # which copies the cache instead of writing into it


class CompilerMissing(Exception):
    """One of torch's own, by its module."""

    __module__ = "torch._inductor.exc"


def test_torch_that_cannot_compile_says_why_and_goes_on(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_step: Callable[[], None]) -> Callable[[], None]:
        def step() -> None:
            raise CompilerMissing("inductor raised:\nno C++ compiler\nand much more")

        return step

    monkeypatch.setattr(torch_steps, "compile_step", refuse)
    engine, reference = exported.engine_of_checkpoint(compiled=True), exported.torch_engine()
    for ids in (PROMPTS["one image first"], PROMPTS["text only"]):
        prefill(engine, exported, ids), prefill(reference, exported, ids)
        for token in NEW:
            np.testing.assert_array_equal(engine.extend([token]), reference.extend([token]))
    assert engine.code == "as written: inductor raised: no C++ compiler"


def test_a_compiled_step_that_fails_later_is_an_error(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have written to the cache by then, so that doing it over would be wrong."""
    calls: list[int] = []

    def once(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("out of memory")
            step()

        return run

    monkeypatch.setattr(torch_steps, "compile_step", once)
    engine = exported.engine_of_checkpoint(compiled=True)
    prefill(engine, exported, PROMPTS["text only"])
    engine.extend([5])
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.extend([6])


def test_torch_on_the_cpu_makes_no_graph(exported: Exported) -> None:
    engine = exported.torch_engine()
    prefill(engine, exported, PROMPTS["text only"])
    for token in NEW:
        engine.extend([token])
    assert engine.decode_mode == "eager"


def test_torch_without_cuda_is_one_clear_error(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="this PyTorch finds no CUDA"):
        exported.engine_of_checkpoint(device="cuda")


def test_cuda_without_cuda_is_one_clear_error(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match=r"svcli\[gpu\]"):
        OnnxEngine(exported.bundle, exported.manifest, provider="cuda")


_CHAT = """
import sys
from pathlib import Path
from typing import Any
import numpy as np
from PIL import Image
from svcli_engines.generate import Conversation, Stats
from svcli_engines.onnx_engine import OnnxEngine
from svcli_engines.processor import Processor
from svcli_engines.sampling import Sampling
from svcli_export.inspection import inspect_bundle
from svcli_export.manifest import load_manifest
import svcli_engines.torch_engine

bundle = Path(sys.argv[1])
inspect_bundle(bundle)
manifest = load_manifest(bundle)
conversation = Conversation(OnnxEngine(bundle, manifest), Processor(bundle, manifest))
picture = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
for images in ([picture], []):
    events = list(conversation.ask("what is this?", images, Sampling(max_new_tokens=3)))
    assert isinstance(events[-1], Stats)
unwanted = {"torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "huggingface_hub"} & set(sys.modules)
assert not unwanted, unwanted
"""


def test_chat_imports_no_torch(exported: Exported) -> None:
    subprocess.run(
        [sys.executable, "-c", _CHAT, str(exported.bundle)], check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
