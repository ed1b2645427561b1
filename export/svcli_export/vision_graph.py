"""The `vision` graph: encoder, projector and the Skip-Vision split (select, merge, summarise).

Shapes: I images or views, P patches, T tokens, D width of the encoder and then of the decoder, R retained, N = T - R
others, M merged. Of joined tiles, T differs from picture to picture, and I is 1 once views are joined.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch

from skipvision.config import Activation, ModelConfig, SkipConfig, VisionConfig
from skipvision.select import split_tokens, token_scores
from svcli_export.builder import GraphBuilder
from svcli_export.contract import MOSAIC_INDEX, MOSAIC_WEIGHT, RETAINED, Contract
from svcli_export.ops import SUMMARY_EPSILON
from svcli_export.quantize import num_blocks_read
from svcli_export.resampler_graph import resample
from svcli_export.weights import WeightFile

_FEATURE_EPSILON = 1e-5  # of F.layer_norm and nn.LayerNorm, torch's default
_MERGE_EPSILON = 1e-6  # an all-zero token is no division by zero


def vision_graph(config: ModelConfig, contract: Contract, weights: WeightFile) -> onnx.ModelProto:
    """`pixels` [I, 3, H, W] to `visual` [I, V, D], and to `retained` [I, R] where tokens are selected."""
    g = GraphBuilder("vision", contract, weights)
    features, attention = _encoder(g, config)
    if config.pixel_shuffle > 1:
        features, attention = _shuffled(g, config, features, attention)
    tokens = _projector(g, config, features)
    if config.tiles is not None and config.tiles.is_joined:
        tokens, attention = _joined(g, config, tokens, attention)
    outputs = {"visual": tokens} if config.skip is None else _split(g, config, config.skip, tokens, attention)
    return g.finish(outputs)


def _encoder(g: GraphBuilder, config: ModelConfig) -> tuple[str, str]:
    """Features [I, P, F], and attention to patches [I, P] in fp32, "" where nothing ranks them by it."""
    vision = config.vision
    selector = config.skip.selector if config.skip is not None else None
    attention = ""
    with g.scope("vision"):
        hidden = _embed(g, config)
        if vision.embedding_norm:
            hidden = g.layer_norm(hidden, "vision.norm", vision.layer_norm_eps)
        features = {0: hidden}
        for layer in range(num_blocks_read(config)):
            with g.scope(f"blocks.{layer}"):
                block = f"vision.blocks.{layer}"
                normed = g.layer_norm(hidden, f"{block}.norm1", vision.layer_norm_eps)
                qkv = g.linear(normed, f"{block}.qkv")
                query, key, value = g.multi("Split", qkv, names=["query", "key", "value"], axis=-1, num_outputs=3)
                if layer + 1 == vision.select_layer and selector == "cls_attention":
                    attention = _cls_attention(g, query, key, vision.num_heads, vision.hidden_size)
                elif layer + 1 == vision.select_layer and selector == "received_attention":
                    attention = _received_attention(g, query, key, vision)
                heads = {"q_num_heads": vision.num_heads, "kv_num_heads": vision.num_heads}
                mixed = g.op("Attention", query, key, value, name="attention", **heads)
                hidden = g.op("Add", hidden, g.linear(mixed, f"{block}.out"), name="after_attention")
                normed = g.layer_norm(hidden, f"{block}.norm2", vision.layer_norm_eps)
                grown = _activated(g, g.linear(normed, f"{block}.fc1"), vision.activation)
                hidden = g.op("Add", hidden, g.linear(grown, f"{block}.fc2"), name="after_mlp")
            features[layer + 1] = hidden
        if vision.output_norm:
            last = vision.num_layers
            features[last] = g.layer_norm(features[last], "vision.output_norm", vision.layer_norm_eps)
        chosen = [features[layer] for layer in vision.feature_layers]
        if vision.has_cls:
            pairs = zip(chosen, vision.feature_layers, strict=True)
            chosen = [g.rows(each, 1, name=f"patches_{layer}") for each, layer in pairs]
        if vision.feature_norm:
            ones = g.constant(np.ones(vision.hidden_size, g.dtype), "ones")
            norm = {"axis": -1, "epsilon": _FEATURE_EPSILON}
            pairs = zip(chosen, vision.feature_layers, strict=True)
            chosen = [g.op("LayerNormalization", each, ones, name=f"features_{n}", **norm) for each, n in pairs]
        return g.op("Concat", *chosen, name="features", axis=-1), attention


def _activated(g: GraphBuilder, hidden: str, activation: Activation) -> str:
    if activation != "quick_gelu":
        approximate = {"approximate": "tanh"} if activation == "gelu_tanh" else {}
        return g.op("Gelu", hidden, name="gelu", **approximate)
    steepness = g.constant(np.array(1.702, g.dtype), "steepness")
    return g.op("Mul", hidden, g.op("Sigmoid", g.op("Mul", hidden, steepness), name="gate"), name="quick_gelu")


def _embed(g: GraphBuilder, config: ModelConfig) -> str:
    """[I, P, D], with CLS [I, 1+P, D]: patches with their positions."""
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
    if not vision.has_cls:
        return g.op("Add", patches, g.weight("vision.position"), name="embedded")
    num_images = g.op("Shape", pixels, name="num_images", start=0, end=1)
    shape = g.op("Concat", num_images, g.ints(1, vision.hidden_size), name="cls_shape", axis=0)
    cls_row = g.op("Expand", g.weight("vision.cls_token"), shape, name="cls_row")
    rows = g.op("Concat", cls_row, patches, name="rows", axis=1)
    return g.op("Add", rows, g.weight("vision.position"), name="embedded")


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


def _received_attention(g: GraphBuilder, query: str, key: str, vision: VisionConfig) -> str:
    """[I, P] in fp32: the mean over all rows of how they attend to each patch, summed over heads, one at a time."""
    with g.scope("received_attention"):
        parts = range(vision.num_heads)
        queries = g.multi("Split", query, names=[f"query_{n}" for n in parts], axis=-1, num_outputs=len(parts))
        keys = g.multi("Split", key, names=[f"key_{n}" for n in parts], axis=-1, num_outputs=len(parts))
        scale = g.constant(np.array((vision.hidden_size // vision.num_heads) ** -0.5, np.float32), "head_scale")
        total = ""
        for head_query, head_key in zip(queries, keys, strict=True):
            columns = g.op("Transpose", head_key, name="key_columns", perm=[0, 2, 1])
            scores = g.op("Mul", _fp32(g, g.op("MatMul", head_query, columns)), scale, name="scores")
            paid = g.op("ReduceMean", g.op("Softmax", scores, axis=-1), g.ints(1), name="paid", keepdims=0)
            total = g.op("Add", total, paid, name="sum") if total else paid
        return g.rows(total, 1, name="patch_sum") if vision.has_cls else total


def _shuffled(g: GraphBuilder, config: ModelConfig, features: str, attention: str) -> tuple[str, str]:
    """[I, P, F] to [I, T, F * s^2], squares of s x s patches side by side; their attention summed."""
    side, channels = config.pixel_shuffle, config.vision.feature_size
    lines = config.vision.grid // side
    with g.scope("pixel_shuffle"):
        squares = g.op("Reshape", features, g.ints(0, lines, side, lines, side, channels), name="grid")
        together = g.op("Transpose", squares, name="squares", perm=[0, 1, 3, 2, 4, 5])
        shuffled = g.op("Reshape", together, g.ints(0, lines**2, config.projector_input), name="features")
        if attention:
            paid = g.op("Reshape", attention, g.ints(0, lines, side, lines, side), name="attention_grid")
            paid = g.op("ReduceSum", paid, g.ints(2, 4), name="attention_squares", keepdims=0)
            attention = g.op("Reshape", paid, g.ints(0, lines**2), name="attention")
    return shuffled, attention


def _joined(g: GraphBuilder, config: ModelConfig, tokens: str, attention: str) -> tuple[str, str]:
    """All views' tokens [I, T, D] to those of the picture [1, T', D], and what is paid to them [1, T']."""
    assert config.tiles is not None
    with g.scope("mosaic"):
        flat = g.op("Reshape", tokens, g.ints(1, -1, config.text.hidden_size), name="views")
        newline = g.op("Unsqueeze", g.weight("newline"), g.ints(0, 1), name="newline_row")
        table = g.op("Concat", flat, newline, name="table", axis=1)
        paid = ""
        if attention:
            nothing = g.constant(np.zeros((1, 1), np.float32), "nothing")
            views = g.op("Reshape", attention, g.ints(1, -1), name="views_attention")
            paid = g.op("Concat", views, nothing, name="attention_table", axis=1)
        if not config.tiles.max_tiles:
            joined = g.op("TokenGather", table, MOSAIC_INDEX, name="tokens")
            return joined, g.op("GatherElements", paid, MOSAIC_INDEX, name="attention", axis=1) if paid else ""
        joined = scores = ""
        for number in range(4):
            index = g.rows(MOSAIC_INDEX, number, number + 1, axis=0, name="index")
            weight = g.rows(MOSAIC_WEIGHT, number, number + 1, axis=0, name="weight")
            column = g.op("Unsqueeze", weight, g.ints(-1), name="weight_column")
            if g.dtype != np.float32:
                column = g.op("Cast", column, name="weight_fp16", to=onnx.TensorProto.FLOAT16)
            part = g.op("Mul", g.op("TokenGather", table, index, name="rows"), column, name="part")
            joined = g.op("Add", joined, part, name="tokens") if joined else part
            if paid:
                share = g.op("Mul", g.op("GatherElements", paid, index, name="paid", axis=1), weight, name="share")
                scores = g.op("Add", scores, share, name="attention") if scores else share
        return joined, scores


def _projector(g: GraphBuilder, config: ModelConfig, features: str) -> str:
    """[I, T, D]."""
    with g.scope("projector"):
        if config.resampler is not None:
            return resample(g, config, features)
        if config.projector == "linear":
            return g.linear(features, "projector.matrix", bias=False)
        hidden = g.op("Gelu", g.linear(features, "projector.fc1"))
        if config.projector_convs:
            hidden = _convs(g, config, hidden)
        hidden = g.linear(hidden, "projector.fc2")
        if config.projector_norm:
            hidden = g.layer_norm(hidden, "projector.norm", _FEATURE_EPSILON)
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


def _split(g: GraphBuilder, config: ModelConfig, skip: SkipConfig, tokens: str, attention: str) -> dict[str, str]:
    """The outputs: visual rows [I, R+M+2, D] ([I, R+1, D] where the rest is dropped) from tokens [I, T, D].

    Also which were retained, unless those are the first.
    """
    chosen = {}
    is_joined = config.tiles is not None and config.tiles.is_joined
    with g.scope("split"):
        if skip.selector == "first":
            retained = g.rows(tokens, 0, skip.num_retained, name="retained")
            rest = g.rows(tokens, skip.num_retained, name="rest") if skip.num_skipped else ""
        else:
            choose = _free_indices if is_joined else _indices
            retained_index, rest_index = choose(g, config, skip, tokens, attention)
            chosen = {RETAINED: retained_index}
            retained = g.op("TokenGather", tokens, retained_index, name="retained")
            rest = g.op("TokenGather", tokens, rest_index, name="rest") if skip.num_skipped else ""
        pooled = g.rows(retained, skip.num_unpooled, name="pooled") if skip.num_unpooled else retained
        groups = [retained, _summary(g, pooled, "retained_summary")]
        if rest:
            num_rest = None if is_joined else config.num_tokens - skip.num_retained
            skipped = rest if skip.num_skipped == num_rest else _merge(g, rest, num_rest, skip.num_skipped)
            groups += [skipped, _summary(g, skipped, "skipped_summary")]
        return {"visual": g.op("Concat", *groups, name="visual", axis=1), **chosen}


def _indices(g: GraphBuilder, config: ModelConfig, skip: SkipConfig, tokens: str, attention: str) -> tuple[str, str]:
    """Indices of the retained [I, R] and the other [I, N] tokens, each in raster order; "" for unused others."""
    num_tokens, retained = config.num_tokens, skip.num_retained
    if skip.selector == "uniform":
        fixed = split_tokens(token_scores("uniform", torch.zeros(1, num_tokens), retained), retained)
        num_images = g.op("Shape", tokens, name="num_images", start=0, end=1)
        shape = g.op("Concat", num_images, g.ints(1), name="index_shape", axis=0)
        chosen = g.op("Expand", g.constant(fixed[0].numpy(), "retained_raster"), shape, name="retained_index")
        if not skip.num_skipped:
            return chosen, ""
        return chosen, g.op("Expand", g.constant(fixed[1].numpy(), "rest_raster"), shape, name="rest_index")
    _, top = g.multi("TopK", attention, g.ints(retained), names=["top_shares", "top_index"], axis=1, sorted=0)
    # One ascending sort brings both groups to raster order: a retained token keeps its number, any other gets +T.
    behind = g.constant(np.arange(num_tokens, 2 * num_tokens, dtype=np.float32), "raster_behind")
    repeated = g.op("Expand", behind, g.op("Shape", attention), name="all_behind")
    number = g.op("Cast", top, name="top_number", to=onnx.TensorProto.FLOAT)
    keys = g.op("ScatterElements", repeated, top, number, name="sort_keys", axis=1)
    if not skip.num_skipped:
        return _order(g, keys, retained, "retained", largest=0), ""
    order = _order(g, keys, num_tokens, "raster", largest=0)
    return g.rows(order, 0, retained, name="retained_index"), g.rows(order, retained, name="rest_index")


def _free_indices(
    g: GraphBuilder, _config: ModelConfig, skip: SkipConfig, tokens: str, attention: str
) -> tuple[str, str]:
    """The same of one picture [1, T, D] with any number of tokens."""
    retained = skip.num_retained
    count = g.op("Shape", tokens, name="num_tokens", start=1, end=2)
    if skip.selector == "uniform":
        steps = g.constant(np.arange(retained, dtype=np.int64)[None], "steps")
        top = g.op("Div", g.op("Mul", steps, count, name="stride"), g.ints(retained), name="top_index")
    else:
        _, top = g.multi("TopK", attention, g.ints(retained), names=["top_shares", "top_index"], axis=1, sorted=0)
    # As above: a retained token keeps its number, any other gets +T.
    number = g.op("Squeeze", count, name="count")
    twice = g.op("Add", number, number, name="twice")
    behind = g.op("Range", number, twice, g.constant(np.array(1), "one_step"), name="raster_behind")
    row = g.op("Unsqueeze", behind, g.ints(0), name="all_behind")
    keys = g.op("ScatterElements", row, top, top, name="sort_keys", axis=1)
    # In fp32, which every run time sorts; whole numbers are exact in it.
    keys = g.op("Cast", keys, name="sort_keys_fp32", to=onnx.TensorProto.FLOAT)
    if not skip.num_skipped:
        return _order(g, keys, retained, "retained", largest=0), ""
    order = _order(g, keys, count, "raster", largest=0)
    return g.rows(order, 0, retained, name="retained_index"), g.rows(order, retained, name="rest_index")


def _merge(g: GraphBuilder, rest: str, num_rest: int | None, num_merged: int) -> str:
    """[I, M, D] from [I, N, D]: the N - M most redundant tokens join their nearest remaining one (merge_tokens).

    Where `num_rest` is None, N is any number: M is at most that, and where they are equal nothing changes.
    """
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
        if num_rest is None:
            count = g.op("Shape", rest, name="num_rest", start=1, end=2)
            merged_count = g.op("Min", count, g.ints(num_merged), name="num_merged")
            sources = g.op("Sub", count, merged_count, name="num_sources")
            redundancy = _unless_none(g, redundancy, sources)
        else:
            count, merged_count, sources = g.ints(num_rest), g.ints(num_merged), g.ints(num_rest - num_merged)
        order = _order(g, redundancy, count, "redundancy", largest=1)
        source = g.rows(order, 0, sources, name="source_index")
        target = g.rows(order, sources, name="target_index")
        unit_sources = g.op("TokenGather", unit, source, name="unit_sources")
        unit_targets = g.op("TokenGather", unit, target, name="unit_targets")
        target_columns = g.op("Transpose", unit_targets, name="target_columns", perm=[0, 2, 1])
        matches = g.op("MatMul", unit_sources, target_columns, name="matches")
        nearest = g.op("ArgMax", matches, name="nearest", axis=2, keepdims=0)
        off_on = g.constant(np.array([0, 1], g.dtype), "off_on")
        assigned = g.op("OneHot", nearest, merged_count, off_on, name="assigned", axis=1)
        joining = g.op("MatMul", assigned, g.op("TokenGather", rest, source, name="sources"), name="joining")
        total = g.op("Add", g.op("TokenGather", rest, target, name="targets"), joining, name="total")
        one = g.floats(1, "one")
        if num_rest is None:
            # The target itself beside its sources: ONNX Runtime's ReduceSum of nothing is nothing, and not 0.
            shape = g.op("Concat", g.ints(1), merged_count, g.ints(1), name="own_shape", axis=0)
            members = g.op("Concat", assigned, g.op("Expand", one, shape, name="own"), name="members", axis=2)
            size = g.op("ReduceSum", members, g.ints(-1), name="group_size", keepdims=1)
        else:
            joined = g.op("ReduceSum", assigned, g.ints(-1), name="num_joined", keepdims=1)
            size = g.op("Add", joined, one, name="group_size")
        return g.op("Div", total, size, name="merged")


def _unless_none(g: GraphBuilder, redundancy: str, num_sources: str) -> str:
    """Sort keys [I, N] that keep tokens in order where none is to be merged."""
    length = g.op("Squeeze", g.op("Shape", redundancy, name="shape", start=1, end=2), name="length")
    steps = g.constant(np.array(0), "first"), length, g.constant(np.array(1), "one_step")
    numbers = g.op("Cast", g.op("Range", *steps, name="range"), name="numbers", to=onnx.TensorProto.FLOAT)
    is_none = g.op("Equal", num_sources, g.ints(0), name="is_none")
    return g.op("Where", is_none, g.op("Neg", numbers, name="backwards"), redundancy, name="sort_keys")


def _order(g: GraphBuilder, keys: str, count: int | str, name: str, largest: int) -> str:
    """Indices [I, count] of the largest or smallest of `keys` [I, n], best first."""
    names = [f"{name}_sorted", f"{name}_order"]
    count = g.ints(count) if isinstance(count, int) else count
    return g.multi("TopK", keys, count, names=names, axis=1, largest=largest, sorted=1)[1]


def _summary(g: GraphBuilder, group: str, name: str) -> str:
    """[I, 1, D] of [I, n, D]."""
    parts = [g.weight(f"summary.{part}") for part in ("norm.weight", "norm.bias", "score.weight", "score.bias")]
    return g.op("SummaryPool", group, *parts, name=name, epsilon=SUMMARY_EPSILON)


def _fp32(g: GraphBuilder, value: str) -> str:
    return value if g.dtype == np.float32 else g.op("Cast", value, name="fp32", to=onnx.TensorProto.FLOAT)
