"""The `vision` graph: encoder, projector and the Skip-Vision split (select, merge, summarise).

Shapes: I images, P patches, D width of the encoder and then of the decoder, R retained, N = P - R others, M merged.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch

from skipvision.config import Activation, ModelConfig, SkipConfig
from skipvision.select import split_tokens, token_scores
from svcli_export.builder import GraphBuilder
from svcli_export.contract import Contract
from svcli_export.ops import SUMMARY_EPSILON
from svcli_export.quantize import num_blocks_read
from svcli_export.weights import WeightFile

_FEATURE_EPSILON = 1e-5  # of F.layer_norm and nn.LayerNorm, torch's default
_MERGE_EPSILON = 1e-6  # an all-zero token is no division by zero


def vision_graph(config: ModelConfig, contract: Contract, weights: WeightFile) -> onnx.ModelProto:
    """`pixels` [I, 3, H, W] to `visual` [I, V, D]."""
    g = GraphBuilder("vision", contract, weights)
    features, cls_attention = _encoder(g, config)
    tokens = _projector(g, config, features)
    visual = tokens if config.skip is None else _split(g, config, config.skip, tokens, cls_attention)
    return g.finish({"visual": visual})


def _encoder(g: GraphBuilder, config: ModelConfig) -> tuple[str, str]:
    """Features [I, P, F], and CLS attention [I, P] in fp32, "" where nothing ranks the patches by it."""
    vision = config.vision
    ranked = config.skip is not None and config.skip.selector == "cls_attention"
    cls_attention = ""
    with g.scope("vision"):
        hidden = _embed(g, config)
        if vision.embedding_norm:
            hidden = _layer_norm(g, hidden, "vision.norm", vision.layer_norm_eps)
        features = {0: hidden}
        for layer in range(num_blocks_read(config)):
            with g.scope(f"blocks.{layer}"):
                block = f"vision.blocks.{layer}"
                normed = _layer_norm(g, hidden, f"{block}.norm1", vision.layer_norm_eps)
                qkv = g.linear(normed, f"{block}.qkv")
                query, key, value = g.multi("Split", qkv, names=["query", "key", "value"], axis=-1, num_outputs=3)
                if ranked and layer + 1 == vision.select_layer:
                    cls_attention = _cls_attention(g, query, key, vision.num_heads, vision.hidden_size)
                heads = {"q_num_heads": vision.num_heads, "kv_num_heads": vision.num_heads}
                mixed = g.op("Attention", query, key, value, name="attention", **heads)
                hidden = g.op("Add", hidden, g.linear(mixed, f"{block}.out"), name="after_attention")
                normed = _layer_norm(g, hidden, f"{block}.norm2", vision.layer_norm_eps)
                grown = _activated(g, g.linear(normed, f"{block}.fc1"), vision.activation)
                hidden = g.op("Add", hidden, g.linear(grown, f"{block}.fc2"), name="after_mlp")
            features[layer + 1] = hidden
        chosen = [g.rows(features[layer], 1, name=f"patches_{layer}") for layer in vision.feature_layers]
        if vision.feature_norm:
            ones = g.constant(np.ones(vision.hidden_size, g.dtype), "ones")
            norm = {"axis": -1, "epsilon": _FEATURE_EPSILON}
            pairs = zip(chosen, vision.feature_layers, strict=True)
            chosen = [g.op("LayerNormalization", each, ones, name=f"features_{n}", **norm) for each, n in pairs]
        return g.op("Concat", *chosen, name="features", axis=-1), cls_attention


def _activated(g: GraphBuilder, hidden: str, activation: Activation) -> str:
    if activation == "gelu":
        return g.op("Gelu", hidden, name="gelu")
    steepness = g.constant(np.array(1.702, g.dtype), "steepness")
    return g.op("Mul", hidden, g.op("Sigmoid", g.op("Mul", hidden, steepness), name="gate"), name="quick_gelu")


def _embed(g: GraphBuilder, config: ModelConfig) -> str:
    """[I, 1+P, D]: CLS and patches with their positions."""
    vision = config.vision
    pixels = "pixels" if g.dtype == np.float32 else g.op("Cast", "pixels", to=onnx.TensorProto.FLOAT16)
    strides = [vision.patch_size] * 2
    conv = g.op(
        "Conv",
        pixels,
        g.weight("vision.patch_embed.weight"),
        g.weight("vision.patch_embed.bias"),
        name="patch_embed",
        strides=strides,
        kernel_shape=strides,
    )
    flat = g.op("Reshape", conv, g.ints(0, vision.hidden_size, vision.num_patches), name="patch_columns")
    patches = g.op("Transpose", flat, name="patches", perm=[0, 2, 1])
    num_images = g.op("Shape", pixels, name="num_images", start=0, end=1)
    shape = g.op("Concat", num_images, g.ints(1, vision.hidden_size), name="cls_shape", axis=0)
    cls_row = g.op("Expand", g.weight("vision.cls_token"), shape, name="cls_row")
    rows = g.op("Concat", cls_row, patches, name="rows", axis=1)
    return g.op("Add", rows, g.weight("vision.position"), name="embedded")


def _layer_norm(g: GraphBuilder, hidden: str, module: str, epsilon: float) -> str:
    scale, bias = g.weight(f"{module}.weight"), g.weight(f"{module}.bias")
    return g.op("LayerNormalization", hidden, scale, bias, name=module.rpartition(".")[2], axis=-1, epsilon=epsilon)


def _cls_attention(g: GraphBuilder, query: str, key: str, num_heads: int, width: int) -> str:
    """[I, P] in fp32: how the CLS row attends to each patch, summed over heads."""
    with g.scope("cls_attention"):
        head = width // num_heads
        split = g.ints(0, -1, num_heads, head)
        row = g.rows(query, 0, 1, name="row")
        row_heads = g.op("Transpose", g.op("Reshape", row, split), name="query_heads", perm=[0, 2, 1, 3])
        key_heads = g.op("Transpose", g.op("Reshape", key, split), name="key_heads", perm=[0, 2, 3, 1])
        products = _fp32(g, g.op("MatMul", row_heads, key_heads))
        scores = g.op("Mul", products, g.constant(np.array(head**-0.5, np.float32), "head_scale"), name="scores")
        shares = g.rows(g.op("Softmax", scores, axis=-1), 1, axis=3, name="patch_shares")
        return g.op("ReduceSum", shares, g.ints(1, 2), name="sum", keepdims=0)


def _projector(g: GraphBuilder, config: ModelConfig, features: str) -> str:
    """[I, P, D]."""
    with g.scope("projector"):
        hidden = g.op("Gelu", g.linear(features, "projector.fc1"))
        if config.projector_convs:
            hidden = _convs(g, config, hidden)
        hidden = g.linear(hidden, "projector.fc2")
        if config.projector_norm:
            hidden = _layer_norm(g, hidden, "projector.norm", _FEATURE_EPSILON)
        if not config.projector_position:
            return hidden
        rows = g.op("Unsqueeze", g.weight("projector.rows"), g.ints(1), name="row_column")
        grid = g.op("Add", rows, g.weight("projector.columns"), name="grid")
        places = g.op("Reshape", grid, g.ints(-1, config.text.hidden_size), name="places")
        return g.op("Add", hidden, places, name="tokens")


def _convs(g: GraphBuilder, config: ModelConfig, hidden: str) -> str:
    """[I, P, H] to [I, P, H], through the grid [I, H, rows, columns]."""
    side, width = config.vision.grid, config.projector_size
    columns = g.op("Transpose", hidden, name="columns_first", perm=[0, 2, 1])
    grid = g.op("Reshape", columns, g.ints(0, width, side, side), name="patch_grid")
    for number in range(config.projector_convs):
        name = f"projector.convs.{number}"
        weight, bias = g.weight(f"{name}.weight"), g.weight(f"{name}.bias")
        mixed = g.op("Conv", grid, weight, bias, name="conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        grid = g.op("Add", grid, g.op("Gelu", mixed), name="mixed")
    flat = g.op("Reshape", grid, g.ints(0, width, side * side), name="mixed_columns")
    return g.op("Transpose", flat, name="mixed_patches", perm=[0, 2, 1])


def _split(g: GraphBuilder, config: ModelConfig, skip: SkipConfig, tokens: str, cls_attention: str) -> str:
    """Visual rows [I, R+M+2, D] ([I, R+1, D] where the rest is dropped) from projected patches [I, P, D]."""
    num_rest = config.vision.num_patches - skip.num_retained
    with g.scope("split"):
        retained_index, rest_index = _indices(g, config, skip, tokens, cls_attention)
        retained = g.op("TokenGather", tokens, retained_index, name="retained")
        groups = [retained, _summary(g, retained, "retained_summary")]
        if skip.num_skipped:
            rest = g.op("TokenGather", tokens, rest_index, name="rest")
            skipped = rest if skip.num_skipped == num_rest else _merge(g, rest, num_rest, skip.num_skipped)
            groups += [skipped, _summary(g, skipped, "skipped_summary")]
        return g.op("Concat", *groups, name="visual", axis=1)


def _indices(
    g: GraphBuilder, config: ModelConfig, skip: SkipConfig, tokens: str, cls_attention: str
) -> tuple[str, str]:
    """Indices of the retained [I, R] and the other [I, N] patches, each in raster order; "" for unused others."""
    num_patches, retained = config.vision.num_patches, skip.num_retained
    if skip.selector == "uniform":
        fixed = split_tokens(token_scores("uniform", torch.zeros(1, num_patches), retained), retained)
        num_images = g.op("Shape", tokens, name="num_images", start=0, end=1)
        shape = g.op("Concat", num_images, g.ints(1), name="index_shape", axis=0)
        chosen = g.op("Expand", g.constant(fixed[0].numpy(), "retained_raster"), shape, name="retained_index")
        if not skip.num_skipped:
            return chosen, ""
        return chosen, g.op("Expand", g.constant(fixed[1].numpy(), "rest_raster"), shape, name="rest_index")
    _, top = g.multi("TopK", cls_attention, g.ints(retained), names=["top_shares", "top_index"], axis=1, sorted=0)
    # One ascending sort brings both groups to raster order: a retained patch keeps its number, any other gets +P.
    behind = g.constant(np.arange(num_patches, 2 * num_patches, dtype=np.float32), "raster_behind")
    repeated = g.op("Expand", behind, g.op("Shape", cls_attention), name="all_behind")
    number = g.op("Cast", top, name="top_number", to=onnx.TensorProto.FLOAT)
    keys = g.op("ScatterElements", repeated, top, number, name="sort_keys", axis=1)
    if not skip.num_skipped:
        return _order(g, keys, retained, "retained", largest=0), ""
    order = _order(g, keys, num_patches, "raster", largest=0)
    return g.rows(order, 0, retained, name="retained_index"), g.rows(order, retained, name="rest_index")


def _merge(g: GraphBuilder, rest: str, num_rest: int, num_merged: int) -> str:
    """[I, M, D] from [I, N, D]: the N - M most redundant tokens join their nearest remaining one (merge_tokens)."""
    with g.scope("merge"):
        wide = _fp32(g, rest)
        norm = g.op("ReduceL2", wide, g.ints(-1), name="norm", keepdims=1)
        floor = g.constant(np.array(_MERGE_EPSILON, np.float32), "merge_epsilon")
        unit = g.op("Div", wide, g.op("Max", norm, floor, name="safe_norm"), name="unit")
        columns = g.op("Transpose", unit, name="unit_columns", perm=[0, 2, 1])
        similarity = g.op("MatMul", unit, columns, name="similarity")
        total_similarity = g.op("ReduceSum", similarity, g.ints(-1), name="total_similarity", keepdims=0)
        own_similarity = g.op("ReduceSumSquare", unit, g.ints(-1), name="own_similarity", keepdims=0)
        redundancy = g.op("Sub", total_similarity, own_similarity, name="redundancy")
        order = _order(g, redundancy, num_rest, "redundancy", largest=1)
        num_sources = num_rest - num_merged
        source = g.rows(order, 0, num_sources, name="source_index")
        target = g.rows(order, num_sources, name="target_index")
        unit_sources = g.op("TokenGather", unit, source, name="unit_sources")
        unit_targets = g.op("TokenGather", unit, target, name="unit_targets")
        target_columns = g.op("Transpose", unit_targets, name="target_columns", perm=[0, 2, 1])
        matches = g.op("MatMul", unit_sources, target_columns, name="matches")
        nearest = g.op("ArgMax", matches, name="nearest", axis=2, keepdims=0)
        depth = g.constant(np.array([num_merged], np.int64), "num_merged")
        off_on = g.constant(np.array([0, 1], g.dtype), "off_on")
        assigned = g.op("OneHot", nearest, depth, off_on, name="assigned", axis=1)
        joining = g.op("MatMul", assigned, g.op("TokenGather", rest, source, name="sources"), name="joining")
        total = g.op("Add", g.op("TokenGather", rest, target, name="targets"), joining, name="total")
        joined = g.op("ReduceSum", assigned, g.ints(-1), name="num_joined", keepdims=1)
        return g.op("Div", total, g.op("Add", joined, g.floats(1, "one"), name="group_size"), name="merged")


def _order(g: GraphBuilder, keys: str, count: int, name: str, largest: int) -> str:
    """Indices [I, count] of the largest or smallest of `keys` [I, n], best first."""
    names = [f"{name}_sorted", f"{name}_order"]
    return g.multi("TopK", keys, g.ints(count), names=names, axis=1, largest=largest, sorted=1)[1]


def _summary(g: GraphBuilder, group: str, name: str) -> str:
    """[I, 1, D] of [I, n, D]."""
    parts = [g.weight(f"summary.{part}") for part in ("norm.weight", "norm.bias", "score.weight", "score.bias")]
    return g.op("SummaryPool", group, *parts, name=name, epsilon=SUMMARY_EPSILON)


def _fp32(g: GraphBuilder, value: str) -> str:
    return value if g.dtype == np.float32 else g.op("Cast", value, name="fp32", to=onnx.TensorProto.FLOAT)
