"""Custom ops in domain `svcli`: for each the eager reference, its fake shapes and its ONNX function.

A node carries `plugin_namespace`, so that TensorRT takes its plugin where one is registered; everyone else
(ONNX Runtime, TensorRT-RTX) inlines the function.
"""

from __future__ import annotations

import torch
from onnx import AttributeProto, FunctionProto, NodeProto, helper
from torch import Tensor

from svcli_export.contract import CUSTOM_DOMAIN, OPSET

PLUGIN_NAMESPACE = "svcli"
SUMMARY_EPSILON = 1e-5
"""LayerNorm epsilon of the summary layer (torch's default)."""


@torch.library.custom_op("svcli::token_gather", mutates_args=())
def token_gather(data: Tensor, index: Tensor) -> Tensor:
    """Rows [B, M, D] of `data` [B, N, D] by `index` [B, M] (int64)."""
    return data.gather(1, index[..., None].expand(-1, -1, data.shape[2]))


@token_gather.register_fake
def _token_gather_shape(data: Tensor, index: Tensor) -> Tensor:
    return data.new_empty(data.shape[0], index.shape[1], data.shape[2])


def token_gather_function() -> FunctionProto:
    """`TokenGather(data, index) -> rows`."""
    nodes = [
        helper.make_node("Constant", [], ["last"], value_ints=[-1]),
        helper.make_node("Unsqueeze", ["index", "last"], ["index_column"]),
        helper.make_node("GatherND", ["data", "index_column"], ["rows"], batch_dims=1),
    ]
    return _function("TokenGather", ["data", "index"], ["rows"], nodes, [])


@torch.library.custom_op("svcli::summary_pool", mutates_args=())
def summary_pool(
    tokens: Tensor, norm_weight: Tensor, norm_bias: Tensor, score_weight: Tensor, score_bias: Tensor, epsilon: float
) -> Tensor:
    """[B, 1, D] of `tokens` [B, N, D]: LayerNorm, score by `score_weight` [1, D], softmax over N, weighted sum."""
    normed = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, epsilon)
    scores = torch.nn.functional.linear(normed, score_weight, score_bias)
    weights = scores.float().softmax(1).to(tokens.dtype)
    return weights.transpose(1, 2) @ tokens


@summary_pool.register_fake
def _summary_pool_shape(
    tokens: Tensor,
    norm_weight: Tensor,  # noqa: ARG001
    norm_bias: Tensor,  # noqa: ARG001
    score_weight: Tensor,  # noqa: ARG001
    score_bias: Tensor,  # noqa: ARG001
    epsilon: float,  # noqa: ARG001
) -> Tensor:
    return tokens.new_empty(tokens.shape[0], 1, tokens.shape[2])


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
    return _function("SummaryPool", inputs, ["summary"], nodes, ["epsilon"])


@torch.library.custom_op("svcli::cache_write", mutates_args=())
def cache_write(past: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """The buffer `past` [1, G, C, d] with `rows` [1, G, n, d] at `slots` [n] (int64, consecutive)."""
    return past.index_copy(2, slots, rows)


@cache_write.register_fake
def _cache_write_shape(past: Tensor, rows: Tensor, slots: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(past)


def cache_write_function() -> FunctionProto:
    """`CacheWrite(past, rows, slots) -> present`: TensorScatter of opset 24, in what opset 23 has.

    ScatterElements writes in place in ONNX Runtime where past and present are bound to one buffer.
    """
    nodes = [
        helper.make_node("Constant", [], ["around"], value_ints=[0, 1, 3]),
        helper.make_node("Unsqueeze", ["slots", "around"], ["slots_column"]),
        helper.make_node("Shape", ["rows"], ["shape"]),
        helper.make_node("Expand", ["slots_column", "shape"], ["index"]),
        helper.make_node("ScatterElements", ["past", "index", "rows"], ["present"], axis=2),
    ]
    return _function("CacheWrite", ["past", "rows", "slots"], ["present"], nodes, [])


FUNCTIONS = {
    "TokenGather": token_gather_function,
    "SummaryPool": summary_pool_function,
    "CacheWrite": cache_write_function,
}


def _function(
    name: str, inputs: list[str], outputs: list[str], nodes: list[NodeProto], attributes: list[str]
) -> FunctionProto:
    # `plugin_namespace` is declared too: the checker wants every node attribute known to the function.
    return helper.make_function(
        CUSTOM_DOMAIN, name, inputs, outputs, nodes, [helper.make_opsetid("", OPSET)], [*attributes, "plugin_namespace"]
    )
