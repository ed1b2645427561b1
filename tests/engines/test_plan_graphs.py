"""Graphs for plan builders do what the bundle's do, and what a builder would get wrong in silence is found.

On whole graphs in ONNX Runtime: it runs TensorScatter too, from the version on that reads opset 24.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from skipvision.layout import FOREVER, TokenLayout
from svcli_engines.graph_problems import problems
from svcli_engines.plan_graphs import (
    PLAN_OPSET,
    GraphError,
    adapt,
    layout_weight_bytes,
    phase_graph,
    phases_of,
    plan_graph,
    plugin_nodes,
    weight_sizes,
)
from svcli_engines.plans import Backend, EngineLayout, phase_spec
from svcli_export.contract import CACHE_PARTS, CUSTOM_DOMAIN, OPSET, GraphName, past_name
from svcli_export.feeds import prompt_feeds
from svcli_export.manifest import Manifest
from svcli_export.runtime import open_session
from tests.engines.conftest import Exported, export_tiny
from tests.export.tiny import IMAGE_SIZE, SKIP_SETTINGS

Arrays = dict[str, npt.NDArray[Any]]
Edit = Callable[[ModelProto], None]

IMAGE = 1
IDS = [2, IMAGE, 7, 8, 3]
NEW = [5, 6, 7]
CACHED = 9
BACKENDS: tuple[Backend, ...] = ("tensorrt", "tensorrt-rtx")
PHASES: tuple[GraphName, ...] = ("vision", "prefill", "decode")
READS_OPSET_24 = tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 24)

needs_opset_24 = pytest.mark.skipif(
    not READS_OPSET_24, reason=f"onnxruntime {ort.__version__} reads no opset 24: adapted graphs were not run"
)


@pytest.fixture(scope="module")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("fp16"), precision="fp16")


def read(exported: Exported, phase: GraphName) -> ModelProto:
    return onnx.load(str(exported.bundle / f"{phase}.onnx"), load_external_data=False)


def feeds(manifest: Manifest, phase: str) -> Arrays:
    """Of one picture in a prompt, in front or (`append`) behind a cache with something in every row, or of new ids."""
    contract, random = manifest.contract, np.random.default_rng(0)
    dtype = np.dtype(contract.compute_dtype)
    pixels = random.standard_normal((1, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    if phase == "vision":
        return {"pixels": pixels}
    each = [past_name(layer, part) for layer in range(contract.num_layers) for part in CACHE_PARTS]
    caches: Arrays = {name: random.standard_normal(contract.cache_shape).astype(dtype) for name in each}
    if phase == "decode":
        positions = np.arange(CACHED + 6, CACHED + 6 + len(NEW))
        ids: Arrays = {"input_ids": np.array([NEW]), "position_ids": positions[None], "write_index": np.array([CACHED])}
        return ids | caches
    layout = TokenLayout.of(IDS, IMAGE, manifest.config)
    visual = next(tensor for tensor in contract.graph("prefill").inputs if tensor.name == "visual")
    prompt: Arrays = {
        "input_ids": np.array([IDS]),
        "visual": random.standard_normal((1, *map(int, visual.shape[1:]))).astype(dtype),
        **(prompt_feeds(layout, CACHED, CACHED + 6) if phase == "append" else prompt_feeds(layout)),
    }
    return prompt | caches


def run(model: ModelProto, bundle: Path, given: Arrays) -> Arrays:
    """Outputs of a graph that lies beside the weights of `bundle`."""
    path = bundle / "under_test.onnx"
    onnx.save(model, str(path))
    try:
        session = open_session(path, num_threads=1)
    finally:
        path.unlink()
    names = [output.name for output in session.get_outputs()]
    wanted = {each.name for each in session.get_inputs()}
    values = session.run(names, {name: value for name, value in given.items() if name in wanted})
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


def assert_same(found: Arrays, expected: Arrays, tolerance: float) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance, err_msg=name)


@needs_opset_24
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("phase", [*PHASES, "append"])
@pytest.mark.parametrize("kind", ["skip", "plain"])
def test_adapted_graphs_do_what_the_bundles_do(
    exported: Exported, exported_plain: Exported, kind: str, phase: str, backend: Backend, tmp_path: Path
) -> None:
    source = exported if kind == "skip" else exported_plain
    bundle = Path(shutil.copytree(source.bundle, tmp_path / "bundle"))
    given = feeds(source.manifest, phase)
    model = read(source, "prefill" if phase == "append" else phase)  # type: ignore[arg-type]
    # Sums over the same rows and over masked ones of the whole buffer.
    assert_same(run(adapt(model, backend), bundle, given), run(model, bundle, given), tolerance=1e-4)


@needs_opset_24
@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_of_several_sequences_does_what_the_bundles_does(
    exported: Exported, backend: Backend, tmp_path: Path
) -> None:
    """Each with a length and positions of its own."""
    bundle = Path(shutil.copytree(exported.bundle, tmp_path / "bundle"))
    lengths = np.array([CACHED, 3, 0])
    given = {
        name: np.random.default_rng(1).standard_normal((3, *value.shape[1:])).astype(value.dtype)
        for name, value in feeds(exported.manifest, "decode").items()
        if name.startswith("past")
    }
    given |= {"input_ids": np.array([[5], [6], [7]]), "position_ids": lengths[:, None] + 6, "write_index": lengths}
    model = read(exported, "decode")
    found = adapt(model, backend, num_sequences=3)
    assert [each.dim_param for each in found.graph.input[0].type.tensor_type.shape.dim] == ["num_sequences", "num_new"]
    assert_same(run(found, bundle, given), run(model, bundle, given), tolerance=1e-4)


@needs_opset_24
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["skip", "plain"])
def test_prefill_with_a_plan_of_its_own_does_what_the_bundles_does_behind_nothing(
    exported: Exported, exported_plain: Exported, kind: str, backend: Backend, tmp_path: Path
) -> None:
    source = exported if kind == "skip" else exported_plain
    bundle = Path(shutil.copytree(source.bundle, tmp_path / "bundle"))
    given = feeds(source.manifest, "prefill")
    alone = phase_graph(bundle, source.manifest, "split", "prefill")
    expected = run(read(source, "prefill"), bundle, given)
    assert_same(run(adapt(alone, backend), bundle, given), expected, tolerance=1e-6)
    onnx.checker.check_model(saved(alone, bundle), full_check=True)
    # Rows are looked at as they were made: nothing that is attended to is as long as a buffer.
    text = source.manifest.config.text
    session_inputs = {tensor.name for tensor in alone.graph.input}
    assert "write_index" not in session_inputs
    writes = {node.output[0] for node in alone.graph.node if node.op_type == "CacheWrite"}
    readers = [node.op_type for node in alone.graph.node if set(node.input) & writes]
    assert len(writes) == 2 * text.num_layers
    assert readers == []


@needs_opset_24
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("kind", ["skip", "plain"])
def test_the_shared_decoder_is_prefill_and_decode(
    exported: Exported, exported_plain: Exported, kind: str, phase: GraphName, backend: Backend, tmp_path: Path
) -> None:
    source = exported if kind == "skip" else exported_plain
    manifest = source.manifest
    bundle = Path(shutil.copytree(source.bundle, tmp_path / "bundle"))
    given = feeds(manifest, phase)
    expected = run(read(source, phase), bundle, given)
    if phase == "decode":  # new ids are a prompt without pictures or skipped rows
        rows = np.arange(len(NEW))[None]
        given |= {"source": rows, "visible_until": np.full_like(rows, FOREVER), "kept_index": rows}
        given["visual"] = feeds(manifest, "prefill")["visual"]
    found = run(adapt(phase_graph(bundle, manifest, "shared", phase), backend), bundle, given)
    # Sums over the same rows and over masked ones, in another order.
    assert_same(found, expected, tolerance=1e-4)


def test_rows_behind_those_that_are_written_stay_as_they_were(exported: Exported, tmp_path: Path) -> None:
    """Of the bundle's own graphs: what adapted ones are held against would not show it if all rows were overwritten."""
    given = feeds(exported.manifest, "decode")
    bundle = Path(shutil.copytree(exported.bundle, tmp_path / "bundle"))
    found = run(read(exported, "decode"), bundle, given)["present.0.key"]
    before = given["past_key_values.0.key"]
    untouched = [row for row in range(before.shape[2]) if not CACHED <= row < CACHED + len(NEW)]
    np.testing.assert_array_equal(found[:, :, untouched], before[:, :, untouched])
    assert (found[:, :, CACHED : CACHED + len(NEW)] != before[:, :, CACHED : CACHED + len(NEW)]).any()


@pytest.mark.parametrize("phase", PHASES)
def test_tensorrt_keeps_the_nodes_that_become_plugins(fp16: Exported, phase: GraphName) -> None:
    model = read(fp16, phase)
    before = Counter(node.op_type for node in model.graph.node if node.domain == CUSTOM_DOMAIN)
    pools = before.pop("SummaryPool", 0)
    del before["CacheWrite"], before["CacheRead"]
    adapted = adapt(model, "tensorrt")
    found = plugin_nodes(adapted)
    assert found == before + Counter(SummaryPartial=pools, SummaryMerge=pools)
    assert {function.name for function in adapted.functions} == set(found)
    ops = {"vision": {"TokenGather", "SummaryPartial", "SummaryMerge"}, "prefill": {"TokenGather"}, "decode": set()}
    assert set(found) == ops[phase]
    onnx.checker.check_model(saved(adapted, fp16.bundle))


def test_a_pool_is_two_nodes_of_the_same_weights(fp16: Exported) -> None:
    model = read(fp16, "vision")
    adapted = adapt(model, "tensorrt")
    pools, partials, merges = (
        nodes(each, op) for each, op in ((model, "SummaryPool"), (adapted, "SummaryPartial"), (adapted, "SummaryMerge"))
    )
    assert len(pools) == len(partials) == len(merges) > 0
    for pool, part, merge in zip(pools, partials, merges, strict=True):
        assert list(part.input) == list(pool.input)
        assert list(merge.input) == [part.output[0], pool.input[1]]
        assert (list(merge.output), merge.name) == (list(pool.output), pool.name)
        assert part.domain == merge.domain == CUSTOM_DOMAIN
        assert attributes(part) == attributes(pool)
        assert attributes(merge) == {"plugin_namespace": b"svcli"}
        assert attributes(pool).keys() == {"plugin_namespace", "epsilon"}
    names = [node.name for node in adapted.graph.node]
    assert len(names) == len(set(names))


def attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


@pytest.mark.parametrize("phase", PHASES)
def test_rtx_gets_nothing_but_standard_ops(fp16: Exported, phase: GraphName) -> None:
    adapted = adapt(read(fp16, phase), "tensorrt-rtx")
    assert {node.domain for node in adapted.graph.node} == {""}
    opset = OPSET if phase == "vision" else PLAN_OPSET
    assert [(each.domain, each.version) for each in adapted.opset_import] == [("", opset)]
    assert not adapted.functions
    assert not plugin_nodes(adapted)
    onnx.checker.check_model(saved(adapted, fp16.bundle))


def saved(model: ModelProto, bundle: Path) -> ModelProto:
    """The model with its weights inside, for the checker."""
    path = bundle / "checked.onnx"
    onnx.save(model, str(path))
    try:
        return onnx.load(str(path))
    finally:
        path.unlink()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_cache_is_updated_by_one_tensor_scatter(fp16: Exported, phase: GraphName, backend: Backend) -> None:
    model = read(fp16, phase)
    adapted = adapt(model, backend)
    updates = [node for node in adapted.graph.node if node.op_type == "TensorScatter"]
    caches = {tensor.name for tensor in model.graph.input if tensor.name.startswith("past_key_values.")}
    assert {node.input[0] for node in updates} == caches
    assert len(updates) == len(caches) == 2 * fp16.manifest.contract.num_layers
    assert len({node.input[2] for node in updates}) == 1
    gone = ("CacheWrite", "CacheRead", "ScatterElements", "ScatterND")
    assert not [node for node in adapted.graph.node if node.op_type in gone]
    assert [tensor.name for tensor in adapted.graph.input] == [tensor.name for tensor in model.graph.input]
    assert [tensor.name for tensor in adapted.graph.output] == [tensor.name for tensor in model.graph.output]


def test_the_model_that_is_adapted_stays_as_it_is(fp16: Exported) -> None:
    model = read(fp16, "decode")
    before = model.SerializeToString(deterministic=True)
    adapt(model, "tensorrt-rtx")
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("skip", ["skip", "drop", "plain"])
def test_all_that_svcli_exports_in_fp16_can_be_built(skip: str, tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, SKIP_SETTINGS[skip], "fp16")
    layouts: dict[EngineLayout, tuple[str, ...]] = {
        "split": ("vision.plan", "prefill.plan", "decode.plan"),
        "shared": ("vision.plan", "decoder.plan"),
    }
    for layout, files in layouts.items():
        for file in files:
            spec = phase_spec(exported.manifest.contract, layout, phases_of(layout, file)[0])
            for backend, num_sequences in product(BACKENDS, (1, 4)):
                model = plan_graph(exported.bundle, exported.manifest, layout, file, backend, num_sequences)
                assert [tensor.name for tensor in model.graph.input] == list(spec.input_names)


def test_a_plan_runs_its_phases_in_the_order_of_its_profiles() -> None:
    assert [phases_of("split", f"{phase}.plan") for phase in PHASES] == [("vision",), ("prefill",), ("decode",)]
    assert phases_of("shared", "decoder.plan") == ("prefill", "decode")
    assert phases_of("split", "decode.plan", 2) == ("decode", "batch")


def test_layouts_differ_by_one_copy_of_the_decoder(fp16: Exported) -> None:
    sizes = {phase: weight_sizes(read(fp16, phase)) for phase in PHASES}
    by_layout = layout_weight_bytes(fp16.bundle, fp16.manifest)
    assert by_layout["split"] == sum(sum(each.values()) for each in sizes.values())
    shared = set(sizes["prefill"]) & set(sizes["decode"])
    assert by_layout["split"] - by_layout["shared"] == sum(sizes["decode"][name] for name in shared)
    matrix = sizes["decode"]["decoder.layers.0.ffn.up.weight.T"]
    text = fp16.manifest.config.text
    assert matrix == text.hidden_size * text.intermediate_size * 2


def nodes(model: ModelProto, op_type: str) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == op_type]


def extend_inputs(number: int, name: str) -> Edit:
    """Gives every Attention `name` as its input `number`."""

    def edit(model: ModelProto) -> None:
        for node in nodes(model, "Attention"):
            node.input.extend([""] * (number - len(node.input)))
            node.input.append(name)

    return edit


def attribute(op_type: str, **values: Any) -> Edit:
    def edit(model: ModelProto) -> None:
        for node in nodes(model, op_type):
            node.attribute.extend(helper.make_attribute(name, value) for name, value in values.items())

    return edit


def second_output(model: ModelProto) -> None:
    nodes(model, "Attention")[0].output.append("present_key")


def float_mask(model: ModelProto) -> None:
    cast_input(model, 3, TensorProto.FLOAT16)


def cast_input(model: ModelProto, number: int, dtype: int) -> None:
    """Of the first Attention."""
    node = nodes(model, "Attention")[0]
    cast = helper.make_node("Cast", [node.input[number]], ["cast"], to=dtype)
    node.input[number] = "cast"
    model.graph.node.insert(list(model.graph.node).index(node), cast)


def no_mask(model: ModelProto) -> None:
    del nodes(model, "Attention")[0].input[3:]


def fp32_attention(model: ModelProto) -> None:
    cast_input(model, 0, TensorProto.FLOAT)


def scatter_elements(model: ModelProto) -> None:
    nodes(model, "TensorScatter")[0].op_type = "ScatterElements"


def other_cache(model: ModelProto) -> None:
    node = nodes(model, "TensorScatter")[0]
    copy = helper.make_node("Identity", [node.input[0]], ["copied"], name="copy")
    node.input[0] = "copied"
    model.graph.node.insert(0, copy)


def inner_update(model: ModelProto) -> None:
    node = nodes(model, "TensorScatter")[0]
    name = node.output[0]
    node.output[0] = "inner"
    model.graph.node.append(helper.make_node("Identity", ["inner"], [name], name="copy"))


def no_index(model: ModelProto) -> None:
    del nodes(model, "TensorScatter")[0].input[2:]


def foreign_op(model: ModelProto) -> None:
    node = nodes(model, "Attention")[0]
    node.op_type, node.domain = "GroupQueryAttention", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def double(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["logits"], ["precise"], to=TensorProto.DOUBLE))


def branch(model: ModelProto) -> None:
    inside = helper.make_graph([], "inside", [], [])
    model.graph.node.append(
        helper.make_node("If", ["logits"], ["either"], name="branch", then_branch=inside, else_branch=inside)
    )


PLANTED: dict[str, tuple[GraphName, Edit, str]] = {
    "nonpad_kv_seqlen": ("decode", extend_inputs(6, "write_index"), "nonpad_kv_seqlen, which TensorRT-RTX silently"),
    "past key": ("decode", extend_inputs(4, "past_key_values.0.key"), "takes past_key"),
    "past value": ("decode", extend_inputs(5, "past_key_values.0.value"), "takes past_value"),
    "softcap": ("prefill", attribute("Attention", softcap=30.0), "softcap=30.0"),
    "causal": ("vision", attribute("Attention", is_causal=1), "is_causal=1"),
    "softmax precision": ("prefill", attribute("Attention", softmax_precision=1), "softmax_precision=1"),
    "second output": ("vision", second_output, "more than one output"),
    "float mask": ("decode", float_mask, "mask of float16 instead of bool"),
    "no mask": ("decode", no_mask, "has no mask"),
    "fp32": ("vision", fp32_attention, "computes in float"),
    "circular": ("decode", attribute("TensorScatter", mode="circular"), "is not linear"),
    "another way to write": ("prefill", scatter_elements, "ScatterElements reads past_key_values.0.key"),
    "a copy is updated": ("decode", other_cache, "updates copied, which is no cache"),
    "an inner tensor": ("decode", inner_update, "makes inner, which is no output"),
    "no write index": ("decode", no_index, "does not say where to write"),
    "foreign op": ("decode", foreign_op, "GroupQueryAttention of the domain com.microsoft"),
    "double": ("decode", double, "TensorRT has no double"),
    "branch": ("decode", branch, "has a graph inside"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("phase", PHASES)
def test_nothing_is_wrong_before_something_is_planted(fp16: Exported, phase: GraphName, backend: Backend) -> None:
    assert problems(adapt(read(fp16, phase), backend)) == []


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_is_found(fp16: Exported, planted: str) -> None:
    phase, edit, words = PLANTED[planted]
    model = adapt(read(fp16, phase), "tensorrt-rtx")
    edit(model)
    assert any(words in problem for problem in problems(model)), problems(model)


def test_an_axis_other_than_that_of_rows_is_found(fp16: Exported) -> None:
    model = adapt(read(fp16, "decode"), "tensorrt-rtx")
    node = nodes(model, "TensorScatter")[0]
    node.attribute[0].i = 1
    assert any("updates axis 1" in problem for problem in problems(model))


def test_a_node_that_would_miss_its_plugin_is_found(fp16: Exported) -> None:
    model = adapt(read(fp16, "prefill"), "tensorrt")
    del nodes(model, "TokenGather")[0].attribute[:]
    assert any("without plugin_namespace=svcli" in problem for problem in problems(model))


def test_an_own_op_without_a_body_is_found(fp16: Exported) -> None:
    model = adapt(read(fp16, "prefill"), "tensorrt")
    del model.functions[:]
    assert any("TokenGather of the domain svcli, for which there is no body" in problem for problem in problems(model))


def test_a_graph_as_it_is_exported_is_no_graph_for_a_plan(fp16: Exported) -> None:
    found = problems(read(fp16, "decode"))
    assert any("reads past_key_values.0.key, which only a TensorScatter updates in place" in each for each in found)


def test_fp32_is_refused_in_one_sentence(exported: Exported) -> None:
    with pytest.raises(GraphError) as refusal:
        plan_graph(exported.bundle, exported.manifest, "split", "vision.plan", "tensorrt-rtx")
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert "Attention computes in float, for which TensorRT-RTX has no kernel" in sentence
    assert "svcli export --precision fp16" in sentence
