"""A bundle's graphs as plan builders want them.

Cache writes become TensorScatter of opset 24, which TensorRT does in place. TensorRT keeps our own ops, since plugins
take the place of their bodies, and SummaryPool is two of them; TensorRT-RTX has no plugins and gets the bodies.
Importing this needs onnx; `shared_graph` also needs torch, through the writer of graphs.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions

from svcli_engines.graph_problems import STANDARD, problems
from svcli_engines.plans import PLACES, Backend, EngineLayout, phase_spec
from svcli_engines.plugins.launch import OPS
from svcli_engines.summary_nodes import split_pools
from svcli_export.contract import CUSTOM_DOMAIN, Contract, GraphName
from svcli_export.manifest import Manifest

if TYPE_CHECKING:
    from svcli_export.decoder_graphs import DecoderGraph

PLAN_OPSET = 24
"""The first that has TensorScatter."""
_CACHE_WRITE, _CACHE_READ = "CacheWrite", "CacheRead"


class GraphError(ValueError):
    """A graph that a plan builder would refuse or get wrong; one sentence that names the first node."""


def phases_of(layout: EngineLayout, file: str) -> tuple[GraphName, ...]:
    """The phases that a plan runs, in the order of its profiles."""
    places = {phase: profile for phase, (name, profile) in PLACES[layout].items() if name == file}
    return tuple(sorted(places, key=places.__getitem__))


def plan_graph(bundle: Path, manifest: Manifest, layout: EngineLayout, file: str, backend: Backend) -> ModelProto:
    """The graph of the plan `file`; its weights are references into the bundle's weight file. Raises GraphError."""
    phases = phases_of(layout, file)
    graph = _read(bundle, manifest, phases[0]) if len(phases) == 1 else shared_graph(bundle, manifest)
    adapted = adapt(graph, backend)
    if found := problems(adapted):
        more = f" ({len(found) - 1} more like it)" if len(found) > 1 else ""
        raise GraphError(
            f"{bundle}: {backend} would not run the graph of {file} as it is meant: {found[0]}{more};"
            " re-export it with `svcli export --precision fp16`"
        )
    return adapted


def adapt(model: ModelProto, backend: Backend) -> ModelProto:
    """A copy for a plan builder: the same function of the same inputs. Only what has a cache needs the newer opset."""
    adapted = ModelProto()
    adapted.CopyFrom(model)
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


def shared_graph(bundle: Path, manifest: Manifest) -> ModelProto:
    """The decoder of a shared plan: prefill behind a cache, which is decode where the rows are new ids.

    Rows attend to the cache and to the skipped rows beside it; kept rows are in the cache when they are read. Shapes as
    in svcli_export/decoder_graphs.py: K kept and S skipped rows now, w rows in the cache before them.
    """
    from svcli_export.decoder_graphs import DecoderGraph, prompt_rows
    from svcli_export.weights import WEIGHTS_FILE, WeightFile

    config, contract = manifest.config, manifest.contract
    spec = phase_spec(contract, "shared", "prefill")
    vision, _, decode = contract.graphs
    shared: Contract = contract.model_copy(update={"graphs": (vision, spec, decode)})
    g = DecoderGraph("prefill", config, shared, WeightFile(bundle / WEIGHTS_FILE))
    hidden = prompt_rows(g)
    skipping = "kept_index" in spec.input_names
    num_kept = g.op("Shape", "kept_index" if skipping else "position_ids", name="num_kept", start=1, end=2)
    last = g.op("Sub", num_kept, g.ints(1), name="last_kept"), num_kept
    slots = g.slots("write_index", num_kept)
    mask = _mask(g, "position_ids", num_kept, skipping)
    for layer in range(config.text.num_layers):
        is_last = layer == config.text.num_layers - 1
        with g.scope(f"decoder.layers.{layer}"):
            normed = g.norm(hidden, f"decoder.layers.{layer}.norm1")
            rows = g.key_value(normed, layer, "position_ids")
            kept = rows
            if skipping:
                kept = {part: g.op("TokenGather", flat, "kept_index", name="kept_rows") for part, flat in rows.items()}
            keys, values = g.write_cache(layer, kept, slots)
            if skipping:
                keys, values = (
                    g.op("Concat", cache, _skipped(g, flat, num_kept), name="attended", axis=2)
                    for cache, flat in zip((keys, values), rows.values(), strict=True)
                )
            positions = "position_ids"
            if is_last:
                normed, hidden = g.rows(normed, *last, name="last_normed"), g.rows(hidden, *last, name="last_row")
                positions = g.rows("position_ids", *last, name="last_position")
                mask = _mask(g, positions, num_kept, skipping)
            query = g.heads(g.query(normed, layer, positions), g.text.num_heads, "query_heads")
            mixed = g.op("Transpose", g.op("Attention", query, keys, values, mask, name="attention"), perm=[0, 2, 1, 3])
            merged = g.op("Reshape", mixed, g.ints(1, -1, g.text.num_heads * g.text.head_dim), name="mixed_rows")
            hidden = g.after_attention(hidden, merged, layer)
            if is_last or not skipping:
                hidden = g.feed_forward(hidden, layer)
            else:
                grown = g.feed_forward(g.rows(hidden, 0, num_kept, name="kept"), layer)
                hidden = g.op("Concat", grown, g.rows(hidden, num_kept, name="skipped"), name="joined", axis=1)
    return g.logits(hidden)


def _skipped(g: DecoderGraph, flat: str, num_kept: str) -> str:
    """[1, G, S, d] of [1, L, G*d]."""
    return g.heads(g.rows(flat, num_kept, name="skipped_rows"), g.text.num_kv_heads, "skipped_heads")


def _mask(g: DecoderGraph, query_positions: str, num_kept: str, skipping: bool) -> str:
    """[1, 1, n, C + S] bool.

    Kept rows are in ascending order and never hidden, so a row sees of the cache all that was there, and as many of
    the new ones as have no later position than it has itself.
    """
    query = g.op("Unsqueeze", query_positions, g.ints(1, 3), name="mask.query")
    key = g.op("Unsqueeze", "position_ids", g.ints(1, 2), name="mask.key")
    before = g.op("LessOrEqual", key, query, name="mask.before")
    new = g.rows(before, 0, num_kept, axis=3, name="mask.new")
    ones = g.op("Cast", new, name="mask.ones", to=TensorProto.INT64)
    counted = g.op("ReduceSum", ones, g.ints(3), name="mask.n")
    all_slots = g.constant(np.arange(g.contract.capacity, dtype=np.int64), "all_slots")
    cached = g.op("Less", all_slots, g.op("Add", counted, "write_index", name="mask.end"), name="mask.cached")
    if not skipping:
        return cached
    until = g.op("Unsqueeze", "visible_until", g.ints(1, 2), name="mask.until")
    visible = g.op("And", before, g.op("LessOrEqual", query, until, name="mask.visible"), name="mask.both")
    return g.op("Concat", cached, g.rows(visible, num_kept, axis=3, name="mask.skipped"), name="mask", axis=3)


def _read(bundle: Path, manifest: Manifest, phase: GraphName) -> ModelProto:
    return onnx.load(str(bundle / manifest.contract.graph(phase).file), load_external_data=False)


def _update_in_place(graph: GraphProto) -> bool:
    """TensorScatter for each CacheWrite, from the first of its consecutive slots on; whole buffers for what CacheRead
    cuts off them, since the mask hides the rest. Returns whether anything was written."""
    nodes: list[NodeProto] = []
    starts: dict[str, str] = {}
    bounds = [f"{_CACHE_WRITE}.{bound}" for bound in (0, 1)]
    whole: dict[str, str] = {}
    for node in graph.node:
        node.input[:] = [whole.get(name, name) for name in node.input]
        if (node.domain, node.op_type) == (CUSTOM_DOMAIN, _CACHE_READ):
            whole[node.output[0]] = node.input[0]
            continue
        if (node.domain, node.op_type) != (CUSTOM_DOMAIN, _CACHE_WRITE):
            nodes.append(node)
            continue
        past, rows, slots = node.input
        if slots not in starts:
            starts[slots] = f"{slots}.first"
            nodes.append(helper.make_node("Slice", [slots, *bounds, bounds[0]], [starts[slots]], name=starts[slots]))
        update = [past, rows, starts[slots]]
        nodes.append(helper.make_node("TensorScatter", update, list(node.output), name=node.name, axis=-2))
    if starts:
        graph.initializer.extend(helper.make_tensor(name, TensorProto.INT64, [1], [int(name[-1])]) for name in bounds)
    del graph.node[:]
    graph.node.extend(nodes)
    return bool(starts)


def _size(tensor: TensorProto) -> int:
    if tensor.data_location == TensorProto.EXTERNAL:
        return int(next(entry.value for entry in tensor.external_data if entry.key == "length"))
    return int(numpy_helper.to_array(tensor).nbytes)
