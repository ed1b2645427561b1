"""ONNX functions of the custom ops in domain `svcli`, each the same as its eager reference in ops.py.

A node carries `plugin_namespace`, so that TensorRT takes its plugin where one is registered; everyone else
(ONNX Runtime, TensorRT-RTX) inlines the function.
"""

from __future__ import annotations

from onnx import AttributeProto, FunctionProto, NodeProto, helper

from svcli_export.contract import CUSTOM_DOMAIN, OPSET

PLUGIN_NAMESPACE = "svcli"


def token_gather_function() -> FunctionProto:
    """`TokenGather(data, index) -> rows`."""
    nodes = [
        helper.make_node("Constant", [], ["last"], value_ints=[-1]),
        helper.make_node("Unsqueeze", ["index", "last"], ["index_column"]),
        helper.make_node("GatherND", ["data", "index_column"], ["rows"], batch_dims=1),
    ]
    return own_function("TokenGather", ["data", "index"], ["rows"], nodes, [])


def summary_pool_function() -> FunctionProto:
    """`SummaryPool(tokens, norm_weight, norm_bias, score_weight, score_bias, epsilon) -> summary`."""
    norm = helper.make_node("LayerNormalization", ["tokens", "norm_weight", "norm_bias"], ["normed"], axis=-1)
    norm.attribute.append(AttributeProto(name="epsilon", ref_attr_name="epsilon", type=AttributeProto.FLOAT))
    nodes = [
        norm,
        helper.make_node("Transpose", ["score_weight"], ["score_column"], perm=[1, 0]),
        helper.make_node("MatMul", ["normed", "score_column"], ["unbiased"]),
        helper.make_node("Add", ["unbiased", "score_bias"], ["scores"]),
        # The softmax runs over hundreds of rows: in half precision it would lose the small weights.
        helper.make_node("Cast", ["scores"], ["scores_fp32"], to=1),
        helper.make_node("Softmax", ["scores_fp32"], ["weights_fp32"], axis=1),
        helper.make_node("CastLike", ["weights_fp32", "tokens"], ["weights"]),
        helper.make_node("Transpose", ["weights"], ["weights_row"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["weights_row", "tokens"], ["summary"]),
    ]
    inputs = ["tokens", "norm_weight", "norm_bias", "score_weight", "score_bias"]
    return own_function("SummaryPool", inputs, ["summary"], nodes, ["epsilon"])


def cache_write_function() -> FunctionProto:
    """`CacheWrite(past, rows, slots) -> present`: TensorScatter of opset 24, in what opset 23 has; slots are [B, n].

    ScatterElements writes in place in ONNX Runtime where past and present are bound to one buffer.
    """
    nodes = [
        helper.make_node("Constant", [], ["around"], value_ints=[1, 3]),
        helper.make_node("Unsqueeze", ["slots", "around"], ["slots_column"]),
        helper.make_node("Shape", ["rows"], ["shape"]),
        helper.make_node("Expand", ["slots_column", "shape"], ["index"]),
        helper.make_node("ScatterElements", ["past", "index", "rows"], ["present"], axis=2),
    ]
    return own_function("CacheWrite", ["past", "rows", "slots"], ["present"], nodes, [])


def cache_read_function() -> FunctionProto:
    """`CacheRead(buffer, length) -> rows`: the rows in use, so that attention costs what they do and not the capacity.

    TensorRT's shapes may not depend on a value: for plans it is left out, since the mask hides the other rows.
    """
    nodes = [
        helper.make_node("Constant", [], ["first"], value_ints=[0]),
        helper.make_node("Constant", [], ["axis"], value_ints=[2]),
        helper.make_node("Slice", ["buffer", "first", "length", "axis"], ["rows"]),
    ]
    return own_function("CacheRead", ["buffer", "length"], ["rows"], nodes, [])


FUNCTIONS = {
    "TokenGather": token_gather_function,
    "SummaryPool": summary_pool_function,
    "CacheWrite": cache_write_function,
    "CacheRead": cache_read_function,
}


def own_function(
    name: str, inputs: list[str], outputs: list[str], nodes: list[NodeProto], attributes: list[str]
) -> FunctionProto:
    """The body of an op in our domain: `nodes` of standard ops.

    `attributes` are those that the nodes refer to, by name.
    """
    # `plugin_namespace` is declared too: the checker wants every node attribute known to the function.
    return helper.make_function(
        CUSTOM_DOMAIN, name, inputs, outputs, nodes, [helper.make_opsetid("", OPSET)], [*attributes, "plugin_namespace"]
    )
