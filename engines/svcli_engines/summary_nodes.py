"""SummaryPool as TensorRT gets it: two nodes, since a plugin that is compiled ahead of time gets no scratch memory.

Between them goes the state of each part of a group, in fp32, as kernels.cu has it. Both have function bodies, which
ONNX Runtime runs in tests; in a plan, plugins take their place. Importing this needs onnx.

Shapes: B images, N rows, D elements of a row, S parts of R rows.
"""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from svcli_engines.plugins.launch import PARTIAL_ROWS
from svcli_export.contract import CUSTOM_DOMAIN
from svcli_export.functions import own_function

_POOL, _PARTIAL, _MERGE = "SummaryPool", "SummaryPartial", "SummaryMerge"


def split_pools(model: ModelProto) -> None:
    """Makes SummaryPartial and SummaryMerge of each SummaryPool, in place, and their bodies of its body."""
    nodes = [part for node in model.graph.node for part in (_split(node) if _is_pool(node) else (node,))]
    if len(nodes) == len(model.graph.node):
        return
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    functions = [function for function in model.functions if function.name != _POOL]
    del model.functions[:]
    model.functions.extend([*functions, partial_function(), merge_function()])


def _is_pool(node: NodeProto) -> bool:
    return (node.domain, node.op_type) == (CUSTOM_DOMAIN, _POOL)


def _split(node: NodeProto) -> tuple[NodeProto, NodeProto]:
    states = f"{node.output[0]}.partial"
    partial = NodeProto()
    partial.CopyFrom(node)
    partial.op_type, partial.name = _PARTIAL, f"{node.name}.partial"
    partial.output[0] = states
    merge = NodeProto()
    merge.CopyFrom(node)
    merge.op_type = _MERGE
    # norm_weight tells the type of the result, and its width.
    merge.input[:] = [states, node.input[1]]
    kept = [attribute for attribute in node.attribute if attribute.name != "epsilon"]
    del merge.attribute[:]
    merge.attribute.extend(kept)
    return partial, merge


def partial_function() -> FunctionProto:
    """`SummaryPartial(tokens, norm_weight, norm_bias, score_weight, score_bias, epsilon) -> partial` [B, S, D + 2].

    Of each part: D weighted sums, the greatest score, the sum of weights. norm_bias and score_bias are not read, as in
    the kernel: they move all scores alike, which a softmax does not see.
    """
    norm = helper.make_node("LayerNormalization", ["rows", "norm_weight_fp32"], ["normed"], axis=-1)
    norm.attribute.append(AttributeProto(name="epsilon", ref_attr_name="epsilon", type=AttributeProto.FLOAT))
    nodes = [
        *(_fp32(name, given) for name, given in (("rows", "tokens"), ("norm_weight_fp32", "norm_weight"))),
        _fp32("score_weight_fp32", "score_weight"),
        norm,
        helper.make_node("Transpose", ["score_weight_fp32"], ["score_column"], perm=[1, 0]),
        helper.make_node("MatMul", ["normed", "score_column"], ["scores"]),
        # Rows that fill the last part score minus infinity, so that they weigh nothing.
        *(_ints(name, each) for name, each in (("none", 0), ("one", 1), ("two", 2), ("less", PARTIAL_ROWS - 1))),
        _ints("part", PARTIAL_ROWS),
        helper.make_node("Shape", ["tokens"], ["batch"], start=0, end=1),
        helper.make_node("Shape", ["tokens"], ["num_rows"], start=1, end=2),
        helper.make_node("Shape", ["tokens"], ["width"], start=2, end=3),
        helper.make_node("Add", ["num_rows", "less"], ["rounded"]),
        helper.make_node("Div", ["rounded", "part"], ["full"]),
        helper.make_node("Max", ["full", "one"], ["num_parts"]),
        helper.make_node("Mul", ["num_parts", "part"], ["filled"]),
        helper.make_node("Sub", ["filled", "num_rows"], ["missing"]),
        helper.make_node("Concat", ["none", "missing"], ["behind"], axis=0),
        *_scalars(),
        helper.make_node("Pad", ["scores", "behind", "minus_infinity", "one"], ["all_scores"]),
        helper.make_node("Pad", ["rows", "behind", "", "one"], ["all_rows"]),
        helper.make_node("Concat", ["batch", "num_parts", "part"], ["score_shape"], axis=0),
        helper.make_node("Concat", ["batch", "num_parts", "part", "width"], ["row_shape"], axis=0),
        helper.make_node("Reshape", ["all_scores", "score_shape"], ["part_scores"]),
        helper.make_node("Reshape", ["all_rows", "row_shape"], ["part_rows"]),
        helper.make_node("ReduceMax", ["part_scores", "two"], ["greatest"]),
        *_weights("part_scores", "greatest"),
        helper.make_node("ReduceSum", ["weights", "two"], ["total"]),
        helper.make_node("Unsqueeze", ["weights", "two"], ["weight_rows"]),
        helper.make_node("MatMul", ["weight_rows", "part_rows"], ["sum_rows"]),
        helper.make_node("Squeeze", ["sum_rows", "two"], ["sums"]),
        helper.make_node("Concat", ["sums", "greatest", "total"], ["partial"], axis=2),
    ]
    inputs = ["tokens", "norm_weight", "norm_bias", "score_weight", "score_bias"]
    return own_function(_PARTIAL, inputs, ["partial"], nodes, ["epsilon"])


def merge_function() -> FunctionProto:
    """`SummaryMerge(partial, norm_weight) -> summary` [B, 1, D], of the type of `norm_weight` [D].

    No rows give zeros.
    """
    nodes = [
        *(_ints(name, each) for name, each in (("one", 1), ("two", 2))),
        helper.make_node("Shape", ["norm_weight"], ["width"], start=0, end=1),
        helper.make_node("Concat", ["width", "one", "one"], ["sizes"], axis=0),
        helper.make_node("Split", ["partial", "sizes"], ["sums", "greatest", "totals"], axis=2),
        helper.make_node("ReduceMax", ["greatest", "one"], ["of_all"]),
        *_scalars(),
        *_weights("greatest", "of_all"),
        helper.make_node("Mul", ["weights", "totals"], ["weighted_totals"]),
        helper.make_node("ReduceSum", ["weighted_totals", "one"], ["total"]),
        helper.make_node("Transpose", ["weights"], ["weight_row"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["weight_row", "sums"], ["sum"]),
        helper.make_node("Equal", ["total", "zero"], ["no_rows"]),
        helper.make_node("Div", ["sum", "total"], ["mean"]),
        helper.make_node("Where", ["no_rows", "zero", "mean"], ["summary_fp32"]),
        helper.make_node("CastLike", ["summary_fp32", "norm_weight"], ["summary"]),
    ]
    return own_function(_MERGE, ["partial", "norm_weight"], ["summary"], nodes, [])


def _weights(scores: str, greatest: str) -> list[NodeProto]:
    """`weights`: exponentials of `scores` under `greatest`, and zero where there is no score at all."""
    return [
        helper.make_node("Equal", [greatest, "minus_infinity"], ["empty"]),
        helper.make_node("Where", ["empty", "zero", greatest], ["level"]),
        helper.make_node("Sub", [scores, "level"], ["below"]),
        helper.make_node("Exp", ["below"], ["weights"]),
    ]


def _scalars() -> list[NodeProto]:
    return [_scalar("minus_infinity", -np.inf), _scalar("zero", 0.0)]


def _scalar(name: str, value: float) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, np.float32)))


def _ints(name: str, value: int) -> NodeProto:
    return helper.make_node("Constant", [], [name], value_ints=[value])


def _fp32(name: str, given: str) -> NodeProto:
    return helper.make_node("Cast", [given], [name], to=TensorProto.FLOAT)
