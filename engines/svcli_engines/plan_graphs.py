"""A bundle's graphs as plan builders want them.

Cache writes become TensorScatter of opset 24, which TensorRT does in place. TensorRT keeps our own ops, since plugins
take the place of their bodies, and SummaryPool is two of them; TensorRT-RTX has no plugins and gets the bodies.
Decode runs as many sequences as it was built for, all else one. Importing this needs onnx, and no torch.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions

from svcli_engines.graph_problems import STANDARD, problems
from svcli_engines.plans import PLACES, Backend, EngineLayout, PlanPhase
from svcli_engines.plugins.launch import OPS
from svcli_engines.summary_nodes import split_pools
from svcli_export.contract import CUSTOM_DOMAIN, NUM_SEQUENCES, GraphName
from svcli_export.manifest import Manifest

PLAN_OPSET = 24
"""The first that has TensorScatter."""
_CACHE_WRITE, _CACHE_READ = "CacheWrite", "CacheRead"
_WRITE_INDEX = "write_index"


class GraphError(ValueError):
    """A graph that a plan builder would refuse or get wrong; one sentence that names the first node."""


def phases_of(layout: EngineLayout, file: str, num_sequences: int = 1) -> tuple[PlanPhase, ...]:
    """The phases that a plan runs, in the order of its profiles."""
    places = {phase: profile for phase, (name, profile) in PLACES[layout].items() if name == file}
    if num_sequences == 1:
        places.pop("batch", None)
    return tuple(sorted(places, key=places.__getitem__))


def plan_graph(
    bundle: Path, manifest: Manifest, layout: EngineLayout, file: str, backend: Backend, num_sequences: int = 1
) -> ModelProto:
    """The graph of the plan `file`; its weights are references into the bundle's weight file. Raises GraphError."""
    adapted = adapt(phase_graph(bundle, manifest, layout, phases_of(layout, file)[0]), backend, num_sequences)
    if found := problems(adapted):
        more = f" ({len(found) - 1} more like it)" if len(found) > 1 else ""
        raise GraphError(
            f"{bundle}: {backend} would not run the graph of {file} as it is meant: {found[0]}{more};"
            " re-export it with `svcli export --precision fp16`"
        )
    return adapted


def phase_graph(bundle: Path, manifest: Manifest, layout: EngineLayout, phase: PlanPhase) -> ModelProto:
    """The bundle's graph that the plan of a phase is made of.

    A shared decoder is prefill behind a cache, which is decode where the rows are new ids.
    """
    if layout == "shared":
        return _read(bundle, manifest, "vision" if phase == "vision" else "prefill")
    graph = _read(bundle, manifest, "decode" if phase == "batch" else phase)
    return behind_nothing(graph) if phase == "prefill" else graph


def adapt(model: ModelProto, backend: Backend, num_sequences: int = 1) -> ModelProto:
    """A copy for a plan builder: the same function of the same inputs. Only what has a cache needs the newer opset.

    Where there is one sequence, that is no free dimension.
    """
    adapted = ModelProto()
    adapted.CopyFrom(model)
    for value in (*adapted.graph.input, *adapted.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if num_sequences == 1 and size.dim_param == NUM_SEQUENCES:
                size.dim_value = 1
    has_cache = _update_in_place(adapted.graph)
    if backend == "tensorrt":
        split_pools(adapted)
    functions = [function for function in adapted.functions if function.name not in (_CACHE_WRITE, _CACHE_READ)]
    del adapted.functions[:]
    adapted.functions.extend(functions)
    for versions in (adapted.opset_import, *(function.opset_import for function in adapted.functions)):
        for version in versions:
            if has_cache and version.domain in STANDARD:
                version.version = PLAN_OPSET
    if backend == "tensorrt-rtx":
        adapted = inline_local_functions(adapted)
    domains = {node.domain for node in adapted.graph.node}
    used = [version for version in adapted.opset_import if version.domain in STANDARD or version.domain in domains]
    del adapted.opset_import[:]
    adapted.opset_import.extend(used)
    return adapted


def plugin_nodes(model: ModelProto) -> Counter[str]:
    """Op types of the nodes that must become plugins, and how many there are of each."""
    return Counter(node.op_type for node in model.graph.node if node.domain == CUSTOM_DOMAIN and node.op_type in OPS)


def weight_sizes(model: ModelProto) -> dict[str, int]:
    """Bytes of each weight of a graph, by name."""
    return {tensor.name: _size(tensor) for tensor in model.graph.initializer}


def layout_weight_bytes(bundle: Path, manifest: Manifest) -> dict[EngineLayout, int]:
    """Bytes of weights that the plans of either layout hold together."""
    vision, prefill, decode = (weight_sizes(_read(bundle, manifest, graph.name)) for graph in manifest.contract.graphs)
    split = sum(sum(sizes.values()) for sizes in (vision, prefill, decode))
    return {"split": split, "shared": sum(vision.values()) + sum((prefill | decode).values())}


def behind_nothing(model: ModelProto) -> ModelProto:
    """A copy of prefill that begins with an empty cache, without `write_index`.

    Behind nothing, what is read back from a cache is what was just written: rows attend to it as it was, and not to the
    whole buffer that would stand for it in a plan.
    """
    alone = ModelProto()
    alone.CopyFrom(model)
    graph = alone.graph
    for tensor in [each for each in graph.input if each.name == _WRITE_INDEX]:
        graph.input.remove(tensor)
    bounds = {_WRITE_INDEX: 0, f"{_CACHE_READ}.first": 0, f"{_CACHE_READ}.axis": 2}
    graph.initializer.extend(
        helper.make_tensor(name, TensorProto.INT64, [1], [value]) for name, value in bounds.items()
    )
    written = {node.output[0]: node.input[1] for node in graph.node if _is(node, _CACHE_WRITE)}
    same: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        if _is(node, _CACHE_READ) and node.input[0] in written:
            same[node.output[0]] = written[node.input[0]]
            continue
        if _is(node, _CACHE_READ):  # the number of rows is a shape here
            part = [node.input[0], f"{_CACHE_READ}.first", node.input[1], f"{_CACHE_READ}.axis"]
            node = helper.make_node("Slice", part, list(node.output), name=node.name)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return alone


def _is(node: NodeProto, op_type: str) -> bool:
    return (node.domain, node.op_type) == (CUSTOM_DOMAIN, op_type)


def _read(bundle: Path, manifest: Manifest, phase: GraphName) -> ModelProto:
    return onnx.load(str(bundle / manifest.contract.graph(phase).file), load_external_data=False)


def _update_in_place(graph: GraphProto) -> bool:
    """TensorScatter for each CacheWrite, from the first of its consecutive slots on; whole buffers for what CacheRead
    cuts off them, since the mask hides the rest. Returns whether anything was written."""
    nodes: list[NodeProto] = []
    starts: dict[str, str] = {}
    zero, one = (f"{_CACHE_WRITE}.{bound}" for bound in (0, 1))
    whole: dict[str, str] = {}
    for node in graph.node:
        node.input[:] = [whole.get(name, name) for name in node.input]
        if _is(node, _CACHE_READ):
            whole[node.output[0]] = node.input[0]
            continue
        if not _is(node, _CACHE_WRITE):
            nodes.append(node)
            continue
        past, rows, slots = node.input
        if slots not in starts:
            starts[slots], column = f"{slots}.start", f"{slots}.first"
            nodes.append(helper.make_node("Slice", [slots, zero, one, one], [column], name=column))
            nodes.append(helper.make_node("Squeeze", [column, one], [starts[slots]], name=starts[slots]))
        update = [past, rows, starts[slots]]
        nodes.append(helper.make_node("TensorScatter", update, list(node.output), name=node.name, axis=-2))
    if starts:
        graph.initializer.extend(
            helper.make_tensor(name, TensorProto.INT64, [1], [value]) for value, name in enumerate((zero, one))
        )
    del graph.node[:]
    graph.node.extend(nodes)
    return bool(starts)


def _size(tensor: TensorProto) -> int:
    if tensor.data_location == TensorProto.EXTERNAL:
        return int(next(entry.value for entry in tensor.external_data if entry.key == "length"))
    return int(numpy_helper.to_array(tensor).nbytes)
