"""What a plan builder would refuse, or silently get wrong, in a graph that is right in ONNX Runtime.

What is not known to be understood is a problem, so that a new op or attribute is looked at before it is used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper
from onnx.inliner import inline_local_functions
from onnx.shape_inference import infer_shapes

from svcli_engines.plugins.registration import NAMESPACE
from svcli_export.contract import CUSTOM_DOMAIN, past_name, present_name

STANDARD = ("", "ai.onnx")
"""Names of ONNX's own domain."""
_PAST, _PRESENT = past_name(0, "key").removesuffix("0.key"), present_name(0, "key").removesuffix("0.key")
_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_DTYPES = (*_HALVES, TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
"""Those that TensorRT and ONNX Runtime both have and understand alike."""
_MASK = 3
_REFUSED_INPUTS = {
    4: "past_key, which TensorRT-RTX refuses",
    5: "past_value, which TensorRT-RTX refuses",
    6: "nonpad_kv_seqlen, which TensorRT-RTX silently ignores",
}
_ATTENTION_ATTRIBUTES = ("q_num_heads", "kv_num_heads", "scale")
"""Any other one must be 0, its default."""


def problems(model: ModelProto) -> list[str]:
    """One clause a problem, with the node it is in; none for what svcli exports in fp16, once adapted."""
    whole = inline_local_functions(model)
    graph, types = whole.graph, _types(whole)
    inputs, outputs = {tensor.name for tensor in graph.input}, {tensor.name for tensor in graph.output}
    found = [f"{node.name}: {fault}" for node in model.graph.node for fault in _plugin_problems(node)]
    for node in graph.node:
        faults = _node_problems(node, types, inputs, outputs)
        found += [f"{node.name or node.output[0]}: {fault}" for fault in faults]
    found += [f"{name}: TensorRT has no {_dtype(each)}" for name, each in types.items() if each not in _DTYPES]
    return found


def _types(model: ModelProto) -> dict[str, int]:
    """dtype of every tensor whose dtype follows from the graph."""
    graph = infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    types: dict[str, int] = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _plugin_problems(node: NodeProto) -> Iterator[str]:
    if node.domain == CUSTOM_DOMAIN:
        namespace = {attribute.name: attribute.s for attribute in node.attribute}.get("plugin_namespace", b"")
        if namespace.decode() != NAMESPACE:
            yield f"{node.op_type} without plugin_namespace={NAMESPACE}, so that TensorRT would not take the plugin"


def _node_problems(
    node: NodeProto, types: Mapping[str, int], inputs: Collection[str], outputs: Collection[str]
) -> Iterator[str]:
    caches = {name for name in inputs if name.startswith(_PAST)}
    if node.domain not in STANDARD:
        yield f"{node.op_type} of the domain {node.domain}, for which there is no body"
    if any(attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for attribute in node.attribute):
        yield f"{node.op_type} has a graph inside, which is not looked into"
    if node.op_type == "Attention":
        yield from _attention_problems(node, types, has_cache=bool(caches))
    if node.op_type == "TensorScatter":
        yield from _update_problems(node, caches, outputs)
        return
    for name in node.input:
        if name in caches:
            yield f"{node.op_type} reads {name}, which only a TensorScatter updates in place"
    for name in node.output:
        if name in outputs and name.startswith(_PRESENT):
            yield f"{node.op_type} makes {name}, which only a TensorScatter updates in place"


def _attention_problems(node: NodeProto, types: Mapping[str, int], *, has_cache: bool) -> Iterator[str]:
    for number, name in enumerate(node.input):
        if name and number > _MASK:
            yield f"Attention takes {_REFUSED_INPUTS.get(number, f'input {number}')}"
    if any(node.output[1:]):
        yield "Attention has more than one output"
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if attribute.name not in _ATTENTION_ATTRIBUTES and value != 0:
            yield f"Attention has {attribute.name}={value}, which not every TensorRT honours"
    if types.get(node.input[0]) not in _HALVES:
        yield f"Attention computes in {_dtype(types.get(node.input[0]))}, for which TensorRT-RTX has no kernel"
    mask = node.input[_MASK] if len(node.input) > _MASK else ""
    if mask and types.get(mask) != TensorProto.BOOL:
        yield f"Attention has a mask of {_dtype(types.get(mask))} instead of bool"
    if has_cache and not mask:
        yield "Attention has no mask, and rows of the cache that hold nothing yet must be hidden"


def _update_problems(node: NodeProto, caches: Collection[str], outputs: Collection[str]) -> Iterator[str]:
    """TensorRT wants a cache to be an input of the graph, and the updated one an output."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.input[0] not in caches:
        yield f"TensorScatter updates {node.input[0]}, which is no cache"
    if node.output[0] not in outputs:
        yield f"TensorScatter makes {node.output[0]}, which is no output"
    if len(node.input) < 3 or not node.input[2]:
        yield "TensorScatter does not say where to write"
    if attributes.get("mode", b"linear") != b"linear":
        yield "TensorScatter is not linear"
    if attributes.get("axis", -2) not in (-2, 2):
        yield f"TensorScatter updates axis {attributes['axis']} instead of the rows"


def _dtype(dtype: int | None) -> str:
    return helper.tensor_dtype_to_string(dtype).removeprefix("TensorProto.").lower() if dtype else "unknown dtype"
