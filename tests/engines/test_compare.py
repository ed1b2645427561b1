"""Engines that do what PyTorch does agree; each planted fault is found, and where it begins."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from skipvision.layout import ImageSpan
from skipvision.tiles import Cut
from svcli.settings import bundled_model
from svcli_engines.base import Engine, Logits, Pixels, Visual
from svcli_engines.compare import CompareError, Comparison, Sample, Trace, compare, samples, trace, verify_engines
from svcli_engines.onnx_engine import OnnxEngine
from svcli_engines.plans import EngineLayout
from svcli_engines.processor import Processor
from svcli_engines.tensorrt_engine import TensorRTEngine
from svcli_engines.torch_engine import TorchEngine
from svcli_export.agreement import (
    NUM_TOKENS,
    TOLERANCES,
    agreeing_rows,
    agreement_of_all,
    difference,
    drawn_cards,
    excess,
    match_rows,
    worst,
)
from svcli_export.contract import GraphName, Precision
from svcli_export.manifest import Manifest, file_entry, load_manifest
from svcli_export.runtime import ProviderError, open_session
from tests.engines.conftest import Exported, export_tiny
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_tensorrt import FakeTensorRT, build_plans

Feeds = dict[str, npt.NDArray[Any]]
PICTURES: dict[str, Image.Image] = {f"card {number}": card for number, card in enumerate(drawn_cards()[:2])}
LAYERS = 2


@dataclass(frozen=True)
class Case:
    """A bundle, and what PyTorch makes of it with the bundle's own weights."""

    exported: Exported
    samples: list[Sample]
    wanted: list[Trace]

    def compare(self, engine: Engine) -> Comparison:
        precision = self.exported.manifest.contract.precision
        return compare(engine, self.wanted, self.samples, TOLERANCES[precision], LAYERS)


def case_of(exported: Exported) -> Case:
    reference = TorchEngine.of_bundle(exported.bundle, exported.manifest)
    cases = samples(exported.processor, PICTURES)
    return Case(exported, cases, [trace(reference, each, LAYERS) for each in cases])


@pytest.fixture(scope="module")
def cases(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    rough: dict[str, Case] = {
        kind: case_of(export_tiny(tmp_path_factory.mktemp(kind), precision=kind)) for kind in _ROUGH
    }
    return {"fp32": case_of(exported), **rough}


_ROUGH: tuple[Precision, ...] = ("fp16", "int8", "int4")


@pytest.fixture(params=["fp32", "int8"])
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_a_sound_engine_agrees_in_every_stage(cases: dict[str, Case], precision: str) -> None:
    case = cases[precision]
    found = case.compare(case.exported.onnx_engine())
    assert found.problems == ()
    steps = [f"decode {step}" for step in range(1, NUM_TOKENS)]
    assert [stage.name for stage in found.stages] == ["vision", "prefill", *steps, "cache"]
    assert found.num_tokens == NUM_TOKENS * len(PICTURES)
    assert found.stages[0].agreement is not None
    assert found.stages[0].agreement >= (1.0 if precision == "fp32" else 0.8)
    assert found.stages[-1].agreement is None
    for stage in found.stages:
        parts = [(layer.layer, layer.part) for layer in stage.layers]
        looked_at = stage.name in ("prefill", "cache")
        assert parts == ([(0, "key"), (0, "value"), (1, "key"), (1, "value")] if looked_at else [])


def test_a_plain_model_agrees_too(exported_plain: Exported) -> None:
    assert case_of(exported_plain).compare(exported_plain.onnx_engine()).problems == ()


@pytest.mark.parametrize("layout", ["split", "shared"])
def test_tensorrt_on_a_fake_gpu_is_compared_through_its_graph(
    cases: dict[str, Case], tmp_path: Path, layout: EngineLayout
) -> None:
    exported, cuda = cases["fp16"].exported, FakeCuda()
    bundle = Path(shutil.copytree(exported.bundle, tmp_path / "bundle"))
    build_plans(bundle, exported.manifest, layout)
    engine = TensorRTEngine(bundle, exported.manifest, tensorrt=FakeTensorRT(cuda), cuda=cuda)
    found = cases["fp16"].compare(engine)
    assert found.problems == ()
    assert found.reads_cache
    assert engine.decode_mode == "graph"


class Altered(OnnxEngine):
    """The onnx engine with other feeds than it made."""

    def __init__(self, exported: Exported, graph: GraphName, change: Callable[[Feeds], None]) -> None:
        super().__init__(exported.bundle, exported.manifest, num_threads=1)
        self._graph, self._change = graph, change

    def _run(self, graph: GraphName, feeds: Any) -> Logits:
        fed = {name: value.copy() for name, value in feeds.items()}
        if graph == self._graph:
            self._change(fed)
        return super()._run(graph, fed)


def next_kept(feeds: Feeds) -> None:
    feeds["kept_index"] = np.minimum(feeds["kept_index"] + 1, feeds["source"].shape[1] - 1)


def next_source(feeds: Feeds) -> None:
    feeds["source"] = np.roll(feeds["source"], 1, axis=1)


def later_prompt(feeds: Feeds) -> None:
    feeds["position_ids"] += 1
    feeds["visible_until"] += 1


def later_step(feeds: Feeds) -> None:
    feeds["position_ids"] += 1


def earlier_row(feeds: Feeds) -> None:
    feeds["write_index"] -= 1


@pytest.mark.parametrize(
    ("graph", "change", "first"),
    [
        ("prefill", next_kept, "prefill: layer 0 key"),
        ("prefill", next_source, "prefill: layer 0 key"),
        # All positions are off by the same, so logits are right: only the cache tells.
        ("prefill", later_prompt, "prefill: layer 0 key"),
        ("decode", later_step, "cache: layer 0 key"),
        ("decode", earlier_row, "decode 1: "),
    ],
    ids=["kept_index", "source", "positions of the prompt", "positions of the steps", "write_index"],
)
def test_an_index_off_by_one_is_found(
    case: Case, graph: GraphName, change: Callable[[Feeds], None], first: str
) -> None:
    found = case.compare(Altered(case.exported, graph, change))
    assert found.problems
    named = [problem for problem in found.problems if problem.startswith(first)]
    assert named, found.problems
    assert "row" in named[0] or "decode" in named[0]


@pytest.fixture(scope="module")
def bundled() -> tuple[Path, Manifest, list[Pixels], list[Visual]]:
    """The model that is shipped, test cards, and PyTorch's visual rows of them."""
    folder = bundled_model()
    manifest = load_manifest(folder)
    processor, reference = Processor(folder, manifest), TorchEngine.of_bundle(folder, manifest)
    pixels = [processor.pixels([card]) for card in drawn_cards()]
    return folder, manifest, pixels, [reference.encode(each) for each in pixels]


def shifted(name: str, num_rows: int) -> Callable[[onnx.ModelProto], None]:
    """The index of a gather, plus one, of rows 0 to `num_rows`."""

    def change(model: onnx.ModelProto) -> None:
        nodes = model.graph.node
        at = next(number for number, node in enumerate(nodes) if node.name == name)
        for constant, value in (("shift.one", 1), ("shift.rows", num_rows)):
            model.graph.initializer.append(onnx.helper.make_tensor(constant, onnx.TensorProto.INT64, [1], [value]))
        index, nodes[at].input[1] = nodes[at].input[1], "shifted"
        nodes.insert(at, onnx.helper.make_node("Add", [index, "shift.one"], ["later"]))
        nodes.insert(at + 1, onnx.helper.make_node("Mod", ["later", "shift.rows"], ["shifted"]))

    return change


def scale_lost(model: onnx.ModelProto) -> None:
    attention = [node for node in model.graph.node if node.op_type == "Attention"]
    attention[3].attribute.append(onnx.helper.make_attribute("scale", 1.0))


@pytest.mark.parametrize(
    ("change", "is_found"),
    [
        (lambda _: None, False),
        (shifted("split.retained", 256), True),
        (shifted("split.rest", 256), True),
        (scale_lost, True),
    ],
    ids=["sound", "retained", "rest", "scale"],
)
def test_a_fault_in_the_encoder_of_the_shipped_model_is_found(
    bundled: tuple[Path, Manifest, list[Pixels], list[Visual]],
    tmp_path: Path,
    change: Callable[[onnx.ModelProto], None],
    is_found: bool,
) -> None:
    folder, manifest, pixels, wanted = bundled
    graph = onnx.load(str(folder / "vision.onnx"), load_external_data=False)
    change(graph)
    onnx.save(graph, str(tmp_path / "vision.onnx"))
    shutil.copy(folder / "weights.safetensors", tmp_path)
    session = open_session(tmp_path / "vision.onnx")
    got = [session.run(None, {"pixels": each})[0] for each in pixels]
    span = ImageSpan.of(manifest.config)
    pairs = [(match_rows(each[0], shown.rows[0], span), shown.rows[0]) for each, shown in zip(got, wanted, strict=True)]
    limit = TOLERANCES[manifest.contract.precision]
    rows = agreement_of_all([agreeing_rows(*pair, limit) for pair in pairs])
    problems = excess(worst(difference(*pair) for pair in pairs), limit, rows)
    assert any("of rows agree" in problem for problem in problems) == is_found, (rows, problems)


class StaleRow(OnnxEngine):
    """In one step the row that was written is lost, and the one before stands there."""

    row: int

    def extend(self, input_ids: Sequence[int]) -> Logits:
        logits = super().extend(input_ids)
        if self.length == self.row + 1:
            for cache in self._shared.caches.values():
                rows = cache.numpy()[0]
                rows[:, self.row] = rows[:, self.row - 1]
        return logits


def test_a_stale_cache_row_is_found_and_named(case: Case) -> None:
    engine = StaleRow(case.exported.bundle, case.exported.manifest, num_threads=1)
    kept = case.samples[0].prompt.layout.num_kept
    engine.row = kept + 5
    found = case.compare(engine)
    cache = found.stages[-1]
    assert any(problem.startswith("cache: layer 0 key") for problem in found.problems)
    assert {layer.row for layer in cache.layers if layer.problems} == {kept + 5}
    assert not any(stage.problems for stage in found.stages[: 2 + 5])  # vision, prefill, and the steps before


@pytest.mark.parametrize(("first", "second"), [((0, "key"), (1, "key")), ((1, "key"), (1, "value"))])
def test_swapped_buffers_of_the_cache_are_found(case: Case, first: Any, second: Any) -> None:
    class Swapped(OnnxEngine):
        def extend(self, input_ids: Sequence[int]) -> Logits:
            caches = self._shared.caches
            self._shared.caches = caches | {first: caches[second], second: caches[first]}
            logits = super().extend(input_ids)
            self._shared.caches = caches
            return logits

    found = case.compare(Swapped(case.exported.bundle, case.exported.manifest, num_threads=1))
    assert not any(stage.problems for stage in found.stages[:2])
    cache = found.stages[-1]
    assert {(layer.layer, layer.part) for layer in cache.layers if layer.problems} >= {first, second}


@pytest.mark.parametrize("graph", ["vision", "prefill", "decode"])
def test_a_lost_scale_is_found_in_its_graph(cases: dict[str, Case], tmp_path: Path, graph: GraphName) -> None:
    case = cases["int8"]
    bundle = shutil.copytree(case.exported.bundle, tmp_path / "bundle")
    lose_a_scale(bundle / f"{graph}.onnx")
    found = case.compare(OnnxEngine(bundle, case.exported.manifest, num_threads=1))
    first = {"vision": "vision", "prefill": "prefill", "decode": "decode 1"}[graph]
    assert found.problems[0].startswith(f"{first}: ")


def lose_a_scale(path: Path) -> None:
    """Sets the scales of one matrix of a graph to 1."""
    model = onnx.load(str(path), load_external_data=False)
    names = [each.name for each in model.graph.initializer if each.name.endswith(".scale")]
    wanted = next(name for name in names if name.endswith(("0.fc1.weight.T.scale", "0.attention.v.weight.T.scale")))
    for tensor in model.graph.initializer:
        if tensor.name == wanted:
            tensor.CopyFrom(numpy_helper.from_array(np.ones(list(tensor.dims), np.float32), wanted))
    onnx.save(model, str(path))


@pytest.mark.parametrize("stage", ["vision", "prefill", "decode 1"])
def test_values_that_are_not_numbers_are_found(case: Case, stage: str) -> None:
    class Broken(OnnxEngine):
        def encode(self, pixels: Pixels, cut: Cut | None = None) -> Visual:
            visual = super().encode(pixels, cut)
            return replace(visual, rows=visual.rows * np.nan) if stage == "vision" else visual

        def _run(self, graph: GraphName, feeds: Any) -> Logits:
            logits = super()._run(graph, feeds)
            if graph == stage.split()[0]:
                logits[7] = np.inf
            return logits

    found = case.compare(Broken(case.exported.bundle, case.exported.manifest, num_threads=1))
    assert found.problems[0].startswith(f"{stage}: error inf")


def test_a_cache_of_another_length_is_found(case: Case) -> None:
    class Short(OnnxEngine):
        def cache_rows(self, layer: int, part: Any) -> npt.NDArray[np.float32]:
            return super().cache_rows(layer, part)[:, :-1]

    found = case.compare(Short(case.exported.bundle, case.exported.manifest, num_threads=1))
    kept = case.samples[0].prompt.layout.num_kept
    assert f"row {kept - 1})" in found.problems[0]


def test_tokens_that_differ_are_found_though_all_values_are_close(case: Case) -> None:
    class Turned(OnnxEngine):
        """Its two likeliest tokens change places."""

        def _run(self, graph: GraphName, feeds: Any) -> Logits:
            logits = super()._run(graph, feeds)
            best, second = np.argsort(logits)[:-3:-1]
            logits[[best, second]] = logits[[second, best]]
            return logits

    engine = Turned(case.exported.bundle, case.exported.manifest, num_threads=1)
    found = compare(engine, case.wanted, case.samples, replace(TOLERANCES["int8"], max_error=1, cosine=0.9), LAYERS)
    assert found.problems == ("only 0% of greedy tokens agree, 75% wanted",)


class Blind:
    """An engine that does not let its cache be read."""

    def __init__(self, engine: OnnxEngine) -> None:
        self._engine = engine
        self.name, self.precision, self.load_seconds = "blind", engine.precision, 0.0
        self.encode, self.prefill, self.extend = engine.encode, engine.prefill, engine.extend
        self.append, self.rewind, self.can_append = engine.append, engine.rewind, engine.can_append
        self.reset, self.close = engine.reset, engine.close
        self.capacity, self.kv_bytes_per_row = engine.capacity, engine.kv_bytes_per_row
        self.length = self.next_position = 0


def test_an_engine_without_a_readable_cache_is_compared_by_its_results(case: Case) -> None:
    found = case.compare(Blind(case.exported.onnx_engine()))
    assert not found.reads_cache
    assert found.problems == ()
    assert found.stages[-1].name == f"decode {NUM_TOKENS - 1}"
    assert all(stage.layers == () for stage in found.stages)


def verified(exported: Exported, candidates: dict[str, Callable[[], Engine]], *, required: bool) -> Any:
    def reference() -> Engine:
        return TorchEngine.of_bundle(exported.bundle, exported.manifest)

    return verify_engines(exported.processor, reference, candidates, PICTURES, required=required)


def absent() -> Engine:
    raise ProviderError("no such hardware; buy some")


def test_what_is_not_here_is_left_out_with_its_reason(exported: Exported) -> None:
    outcome = verified(exported, {"gone": absent, "onnxruntime": exported.onnx_engine}, required=False)
    assert [comparison.engine for comparison in outcome.comparisons] == ["onnxruntime-cpu"]
    assert {name: str(error) for name, error in outcome.left_out.items()} == {"gone": "no such hardware; buy some"}
    assert outcome.reference == "torch-cpu"
    assert outcome.pictures == tuple(PICTURES)
    assert outcome.mismatches == []


def test_what_was_asked_for_must_be_here_before_anything_is_computed(exported: Exported) -> None:
    def reference() -> Engine:
        raise AssertionError("nothing should have been computed")

    with pytest.raises(ProviderError, match="buy some"):
        verify_engines(exported.processor, reference, {"gone": absent}, PICTURES, required=True)


def test_no_engine_at_all_is_an_error_with_the_reasons(exported: Exported) -> None:
    with pytest.raises(CompareError, match=r"gone cannot be had \(no such hardware; buy some\)"):
        verified(exported, {"gone": absent}, required=False)


def test_engines_are_open_one_at_a_time(exported: Exported) -> None:
    events: list[str] = []

    def opener(name: str) -> Callable[[], Engine]:
        def opened() -> Engine:
            events.append(f"open {name}")
            engine = exported.onnx_engine()
            close = engine.close

            def closed() -> None:
                events.append(f"close {name}")
                close()

            engine.close = closed  # type: ignore[method-assign]
            return engine

        return opened

    verify_engines(exported.processor, opener("r"), {"a": opener("a"), "b": opener("b")}, PICTURES, required=False)
    assert events == ["open r", "close r", "open a", "close a", "open b", "close b"]


def test_against_the_checkpoint_a_fault_in_the_stored_weights_shows(cases: dict[str, Case], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    exported = cases["int8"].exported
    bundle = shutil.copytree(exported.bundle, tmp_path / "bundle")
    tensors = load_file(bundle / "weights.safetensors")
    name = "decoder.layers.0.attention.v.weight.T.scale"
    save_file(tensors | {name: np.ones_like(tensors[name])}, bundle / "weights.safetensors")
    manifest = exported.manifest.model_copy(
        update={"files": exported.manifest.files | {"weights.safetensors": file_entry(bundle / "weights.safetensors")}}
    )
    altered = Exported(exported.checkpoint, bundle, manifest)
    own = case_of(altered)  # both sides read the same wrong weights
    assert own.compare(altered.onnx_engine()).problems == ()
    reference = TorchEngine.of_bundle(bundle, manifest, checkpoint=exported.checkpoint)
    wanted = [trace(reference, each, LAYERS) for each in own.samples]
    found = compare(altered.onnx_engine(), wanted, own.samples, TOLERANCES["int8"], LAYERS)
    assert found.problems[0].startswith("prefill: layer 0 value")
