"""The graphs in ONNX Runtime do what the PyTorch model does, in every setting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from skipvision.model import SkipVisionModel
from svcli_export.contract import Contract, Precision, build_contract
from svcli_export.decoder_graphs import decode_graph, prefill_graph
from svcli_export.quantize import stored_tensors
from svcli_export.runtime import open_session
from svcli_export.verify import verify, violations
from svcli_export.vision_graph import vision_graph
from svcli_export.weights import WEIGHTS_FILE, WeightFile
from tests.export.tiny import IMAGE_SIZE, SKIP_SETTINGS, asked, tiny_model

PROMPT = [2, 5, 1, 6, 7, 3]


@dataclass
class Written:
    model: SkipVisionModel
    contract: Contract
    folder: Path
    weights: WeightFile
    graphs: dict[str, onnx.ModelProto]


def write(folder: Path, skip: str, precision: Precision, *, tied: bool = True, clip: bool = False) -> Written:
    model = tiny_model(SKIP_SETTINGS[skip], tied=tied, clip=clip)
    contract = build_contract(model.config, 64, 2, precision)
    weights = WeightFile.write(stored_tensors(model, contract), folder / WEIGHTS_FILE)
    graphs: dict[str, onnx.ModelProto] = {}
    for spec, build in zip(contract.graphs, (vision_graph, prefill_graph, decode_graph), strict=True):
        graphs[spec.name] = build(model.config, contract, weights)
        onnx.save(graphs[spec.name], folder / spec.file)
    return Written(model, contract, folder, weights, graphs)


def pictures() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((2, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)


@pytest.mark.parametrize("skip", SKIP_SETTINGS)
def test_fp32_equals_torch_stage_by_stage(tmp_path: Path, skip: str) -> None:
    written = write(tmp_path, skip, "fp32")
    check = verify(written.model, written.contract, tmp_path, asked(written.model, pictures(), PROMPT))
    assert [stage.name for stage in check.stages] == ["vision", "prefill", "decode"]
    assert max(stage.max_error for stage in check.stages) < 1e-4  # other summation orders only
    assert check.agreement == 1


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("skip", ["skip", "drop", "plain"])
def test_lower_precision_stays_within_its_tolerance(tmp_path: Path, skip: str, precision: Precision) -> None:
    written = write(tmp_path, skip, precision)
    check = verify(written.model, written.contract, tmp_path, asked(written.model, pictures(), PROMPT))
    assert violations(check, precision) == []


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_untied_head_is_exported(tmp_path: Path, precision: Precision) -> None:
    # All patches retained: in a model this small, int8 rounding turns which rows merge, and no head has a part in that.
    written = write(tmp_path, "all-retained", precision, tied=False)
    assert "decoder.head.weight.T" in written.weights.names
    check = verify(written.model, written.contract, tmp_path, asked(written.model, pictures(), PROMPT))
    assert violations(check, precision) == []


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("skip", ["skip", "plain"])
def test_a_tower_as_llava_has_it_is_exported(tmp_path: Path, skip: str, precision: Precision) -> None:
    written = write(tmp_path, skip, precision, clip=True)
    assert {"vision.norm.weight", "vision.norm.bias"} <= written.weights.names
    ops = {node.op_type for node in written.graphs["vision"].graph.node}
    assert "Sigmoid" in ops
    check = verify(written.model, written.contract, tmp_path, asked(written.model, pictures(), PROMPT))
    assert violations(check, precision) == []


def test_a_wrong_weight_is_noticed(tmp_path: Path) -> None:
    written = write(tmp_path, "skip", "fp32")
    with torch.no_grad():
        written.model.get_parameter("decoder.layers.1.norm2.weight")[3] += 0.5
    found = violations(
        verify(written.model, written.contract, tmp_path, asked(written.model, pictures(), PROMPT)), "fp32"
    )
    assert any(clause.startswith("prefill: error") for clause in found)
    assert not any(clause.startswith("vision") for clause in found)


def test_a_graph_that_is_right_in_an_empty_cache_alone_is_noticed(tmp_path: Path) -> None:
    """Its rows see as many of the cache as if nothing had been there before."""
    written = write(tmp_path, "skip", "fp32")
    graph = written.graphs["prefill"].graph
    ends = [node for node in graph.node if node.op_type == "Add" and node.name.endswith("mask.end")]
    assert len(ends) == 2  # of all rows, and of the last
    graph.initializer.append(onnx.helper.make_tensor("nothing", onnx.TensorProto.INT64, [1], [0]))
    for node in ends:
        node.input[1] = "nothing"
    onnx.save(written.graphs["prefill"], tmp_path / "prefill.onnx")
    found = violations(
        verify(written.model, written.contract, tmp_path, asked(written.model, pictures(), PROMPT)), "fp32"
    )
    assert [clause.split(":")[0] for clause in found] == ["prefill"] * len(found)
    assert found


@pytest.mark.parametrize("change", ["later", "backwards"])
def test_retained_tokens_that_are_others_are_noticed(tmp_path: Path, change: str) -> None:
    """The rows are right, and what is told of them is not."""
    written = write(tmp_path, "skip", "fp32")
    model = written.graphs["vision"]
    for node in model.graph.node:
        node.input[:] = ["chosen" if name == "retained" else name for name in node.input]
        node.output[:] = ["chosen" if name == "retained" else name for name in node.output]
    one = onnx.helper.make_tensor("by", onnx.TensorProto.INT64, [1], [1 if change == "later" else -1])
    model.graph.initializer.append(one)
    op_type = "Add" if change == "later" else "Mul"
    model.graph.node.append(onnx.helper.make_node(op_type, ["chosen", "by"], ["retained"], name="changed"))
    onnx.save(model, tmp_path / "vision.onnx")
    found = violations(
        verify(written.model, written.contract, tmp_path, asked(written.model, pictures(), PROMPT)), "fp32"
    )
    assert len(found) == 1
    assert "of rows agree, 100% wanted" in found[0]


def test_a_number_that_is_none_is_noticed(tmp_path: Path) -> None:
    written = write(tmp_path, "skip", "fp32")
    with torch.no_grad():
        written.model.get_parameter("decoder.layers.1.norm2.weight")[3] = torch.nan
    found = violations(
        verify(written.model, written.contract, tmp_path, asked(written.model, pictures(), PROMPT)), "fp32"
    )
    assert any(clause.startswith("prefill: cosine") for clause in found)


@pytest.mark.parametrize("value", [0.5, torch.nan])
def test_a_rounded_weight_that_is_another_is_noticed(tmp_path: Path, value: float) -> None:
    """PyTorch computes with the rounded weights, so that those must be the model's."""
    written = write(tmp_path, "skip", "int4")
    with torch.no_grad():
        written.model.get_parameter("decoder.layers.1.ffn.up.weight")[3] += value
    found = violations(
        verify(written.model, written.contract, tmp_path, asked(written.model, pictures(), PROMPT)), "int4"
    )
    assert len(found) == 1
    assert found[0].startswith("a matrix is ")


@pytest.mark.parametrize("skip", SKIP_SETTINGS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_graphs_are_valid_and_nothing_in_them_is_dead(tmp_path: Path, skip: str, precision: Precision) -> None:
    written = write(tmp_path, skip, precision)
    stored: set[str] = set()
    for spec in written.contract.graphs:
        onnx.checker.check_model(str(tmp_path / spec.file), full_check=True)
        graph = written.graphs[spec.name].graph
        read = {name for node in graph.node for name in node.input} | {tensor.name for tensor in graph.output}
        assert [node.name for node in graph.node if not read & set(node.output)] == []
        made = [name for node in graph.node for name in node.output]
        assert len(set(made)) == len(made)
        assert {tensor.name for tensor in graph.initializer} <= read
        assert {tensor.name for tensor in graph.input} <= read
        stored |= {tensor.name for tensor in graph.initializer if tensor.external_data}
    tied_head = {"decoder.head.weight.T", "decoder.head.weight.T.scale"} & stored
    assert stored - tied_head == written.weights.names


def test_sessions_show_the_contract(tmp_path: Path) -> None:
    written = write(tmp_path, "skip", "fp32")
    for spec in written.contract.graphs:
        session = open_session(tmp_path / spec.file)
        for tensors, nodes in ((spec.inputs, session.get_inputs()), (spec.outputs, session.get_outputs())):
            assert [(t.name, list(t.shape)) for t in tensors] == [(node.name, list(node.shape)) for node in nodes]


def test_custom_ops_carry_the_plugin_namespace_and_a_body(tmp_path: Path) -> None:
    graphs = write(tmp_path, "skip", "fp32").graphs
    ours = [node for graph in graphs.values() for node in graph.graph.node if node.domain == "svcli"]
    assert {node.op_type for node in ours} == {"TokenGather", "SummaryPool", "CacheWrite", "CacheRead"}
    for node in ours:
        namespace = [attribute.s for attribute in node.attribute if attribute.name == "plugin_namespace"]
        assert namespace == [b"svcli"]
    for graph in graphs.values():
        bodies = {function.name for function in graph.functions}
        assert bodies == {node.op_type for node in graph.graph.node if node.domain == "svcli"}


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_onnxruntime_inlines_the_bodies_and_fuses_what_is_quantised(
    tmp_path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the options that chat opens sessions with."""
    written = write(tmp_path, "skip", precision)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    monkeypatch.setattr(ort, "SessionOptions", lambda: options)
    for spec in written.contract.graphs:
        open_session(tmp_path / spec.file)
        nodes = onnx.load(str(tmp_path / "optimised.onnx"), load_external_data=False).graph.node
        ops = {node.op_type for node in nodes}
        assert not ops & {"TokenGather", "SummaryPool", "CacheWrite", "CacheRead", "DequantizeLinear"}
        products = [{each.name: each.i for each in node.attribute} for node in nodes if node.op_type == "MatMulNBits"]
        in_graph = sum(node.op_type == "DequantizeLinear" for node in written.graphs[spec.name].graph.node)
        assert len(products) == in_graph > 0
        assert {each["accuracy_level"] for each in products} == {4}
        in_blocks = 2 * 7 if precision == "int4" and spec.name != "vision" else 0  # of two layers
        assert sum(each["bits"] == 4 and each["block_size"] == 32 for each in products) == in_blocks


def test_graphs_are_old_enough_for_python_310(tmp_path: Path) -> None:
    graphs = write(tmp_path, "skip", "fp16").graphs
    imports = [entry for graph in graphs.values() for entry in graph.opset_import]
    imports += [entry for graph in graphs.values() for body in graph.functions for entry in body.opset_import]
    assert {entry.version for entry in imports if not entry.domain} == {23}
    assert all(graph.ir_version <= 11 for graph in graphs.values())


def test_no_tracer_was_here(tmp_path: Path) -> None:
    graphs = write(tmp_path, "skip", "fp32").graphs
    ops = {node.op_type for graph in graphs.values() for node in graph.graph.node}
    assert not ops & {"ScatterND", "Identity", "If", "Loop", "Where"}
    names = {node.name for node in graphs["decode"].graph.node}
    assert "decoder.layers.1.attention.q" in names
    assert sum(node.op_type == "Attention" for node in graphs["decode"].graph.node) == 2
    assert all(len(node.input) == 4 for node in graphs["prefill"].graph.node if node.op_type == "Attention")
