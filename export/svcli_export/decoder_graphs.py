"""The `prefill` and `decode` graphs: a Llama-type decoder that writes reduced K and V into fixed buffers.

Shapes: T ids, L rows, n new rows, D width, H heads, G KV heads, d head size, C cache capacity. One sequence.
"""

from __future__ import annotations

import numpy as np
import onnx

from skipvision.config import ModelConfig
from svcli_export.builder import GraphBuilder
from svcli_export.contract import CachePart, Contract, GraphName, past_name, present_name
from svcli_export.quantize import ROPE_COS, ROPE_SIN, SCALE, TRANSPOSED
from svcli_export.weights import WeightFile

_EMBEDDING = "decoder.embed.weight"


class DecoderGraph(GraphBuilder):
    """What prefill and decode share."""

    def __init__(self, name: GraphName, config: ModelConfig, contract: Contract, weights: WeightFile) -> None:
        super().__init__(name, contract, weights)
        self.text = config.text
        self.caches: dict[str, str] = {}
        """Graph output to value."""

    def embed(self) -> str:
        """Text embeddings [1, T, D]. The table is stored [D, V] for the tied head, so ids pick columns."""
        with self.scope("decoder.embed"):
            columns = self.op("Gather", self.weight(_EMBEDDING + TRANSPOSED), "input_ids", name="columns", axis=1)
            rows = self.op("Transpose", columns, name="rows", perm=[1, 2, 0])
            if not self.has_weight(_EMBEDDING + TRANSPOSED + SCALE):
                return rows
            scales = self.op("Gather", self.weight(_EMBEDDING + TRANSPOSED + SCALE), "input_ids", name="scale")
            column = self.op("Unsqueeze", scales, self.ints(-1), name="scale_column")
            return self.op("Mul", self.op("Cast", rows, to=onnx.TensorProto.FLOAT), column, name="dequantized")

    def norm(self, hidden: str, module: str) -> str:
        scale = self.weight(f"{module}.weight")
        name = module.rpartition(".")[2]
        return self.op("RMSNormalization", hidden, scale, name=name, axis=-1, epsilon=self.text.rms_norm_eps)

    def rotate(self, heads: str, positions: str, num_heads: int, name: str) -> str:
        """RoPE on [1, n, heads*d] at `positions` [1, n]."""
        tables = self.weight(ROPE_COS), self.weight(ROPE_SIN)
        return self.op("RotaryEmbedding", heads, *tables, positions, name=name, num_heads=num_heads)

    def key_value(self, normed: str, layer: int, positions: str) -> dict[CachePart, str]:
        """Rotated key and value of one layer, both [1, n, G*d]."""
        module = f"decoder.layers.{layer}.attention"
        key = self.linear(normed, f"{module}.k", bias=self.text.qkv_bias)
        rotated = self.rotate(key, positions, self.text.num_kv_heads, "attention.k_rotated")
        return {"key": rotated, "value": self.linear(normed, f"{module}.v", bias=self.text.qkv_bias)}

    def query(self, normed: str, layer: int, positions: str) -> str:
        """Rotated query [1, n, H*d]."""
        query = self.linear(normed, f"decoder.layers.{layer}.attention.q", bias=self.text.qkv_bias)
        return self.rotate(query, positions, self.text.num_heads, "attention.q_rotated")

    def heads(self, flat: str, num_heads: int, name: str) -> str:
        """[1, n, heads*d] to [1, heads, n, d]."""
        shape = self.ints(1, -1, num_heads, self.text.head_dim)
        return self.op("Transpose", self.op("Reshape", flat, shape, name=f"{name}_rows"), name=name, perm=[0, 2, 1, 3])

    def slots(self, first: str, count: str) -> str:
        """Cache rows [n]: `first` [1] and those behind it; `count` [1] is n."""
        zero, one = self.constant(np.array(0), "zero"), self.constant(np.array(1), "one")
        offsets = self.op("Range", zero, self.op("Squeeze", count, name="count"), one, name="offsets")
        return self.op("Add", offsets, first, name="slots")

    def write_cache(self, layer: int, rows: dict[CachePart, str], slots: str) -> list[str]:
        """Puts key and value `rows` [1, n, G*d] at `slots` [n] of the layer's buffers; returns those [1, G, C, d]."""
        buffers = []
        for part, flat in rows.items():
            update = self.heads(flat, self.text.num_kv_heads, f"{part}_heads")
            buffer = self.op("CacheWrite", past_name(layer, part), update, slots, name=f"{part}_cache")
            self.caches[present_name(layer, part)] = buffer
            buffers.append(buffer)
        return buffers

    def attend(self, query: str, key: str, value: str, mask: str) -> str:
        """`mask` is bool, [1, 1, n, K]. Inputs are [1, n, heads*d]."""
        heads = {"q_num_heads": self.text.num_heads, "kv_num_heads": self.text.num_kv_heads}
        return self.op("Attention", query, key, value, mask, name="attention", **heads)

    def after_attention(self, hidden: str, mixed: str, layer: int) -> str:
        out = self.linear(mixed, f"decoder.layers.{layer}.attention.o", bias=False)
        return self.op("Add", hidden, out, name="after_attention")

    def feed_forward(self, hidden: str, layer: int) -> str:
        """SwiGLU with its norm and residual."""
        module = f"decoder.layers.{layer}"
        normed = self.norm(hidden, f"{module}.norm2")
        gate = self.linear(normed, f"{module}.ffn.gate", bias=False)
        gated = self.op("Mul", gate, self.op("Sigmoid", gate, name="ffn.sigmoid"), name="ffn.silu")
        grown = self.op("Mul", gated, self.linear(normed, f"{module}.ffn.up", bias=False), name="ffn.grown")
        return self.op("Add", hidden, self.linear(grown, f"{module}.ffn.down", bias=False), name="after_ffn")

    def logits(self, row: str) -> onnx.ModelProto:
        """Ends the graph: `row` [1, 1, D] to logits [1, vocab] in fp32."""
        with self.scope("decoder"):
            normed = self.norm(row, "decoder.norm")
            # A tied head is the embedding's bytes under a name of its own: ONNX Runtime fuses DequantizeLinear into
            # MatMul only where nothing else reads the weight.
            stored = _EMBEDDING if self.text.tie_embeddings else ""
            scores = self.op("MatMul", normed, self.matrix("decoder.head.weight", stored), name="head")
            logits = self.op("Squeeze", scores, self.ints(1), name="last")
            if self.dtype != np.float32:
                logits = self.op("Cast", logits, name="fp32", to=onnx.TensorProto.FLOAT)
        return self.finish({"logits": logits, **self.caches})


def prefill_graph(config: ModelConfig, contract: Contract, weights: WeightFile) -> onnx.ModelProto:
    """All rows of a prompt at once; K and V of kept rows go to 0..num_kept of empty buffers.

    Rows are in memory order, kept rows first, so the FFN stream is a slice. In the last layer only the last kept row
    is asked for, and only it is computed beyond K and V.
    """
    g = DecoderGraph("prefill", config, contract, weights)
    hidden = prompt_rows(g)
    skipping = "kept_index" in g.spec.input_names
    num_kept = g.op("Shape", "kept_index" if skipping else "position_ids", name="num_kept", start=1, end=2)
    last = g.op("Sub", num_kept, g.ints(1), name="last_kept"), num_kept
    slots = g.slots(g.ints(0), num_kept)
    mask = _mask(g, "position_ids", "mask") if config.text.num_layers > 1 else ""
    for layer in range(config.text.num_layers):
        is_last = layer == config.text.num_layers - 1
        with g.scope(f"decoder.layers.{layer}"):
            normed = g.norm(hidden, f"decoder.layers.{layer}.norm1")
            rows = g.key_value(normed, layer, "position_ids")
            if skipping:
                kept_rows = {
                    part: g.op("TokenGather", flat, "kept_index", name="kept_rows") for part, flat in rows.items()
                }
            g.write_cache(layer, kept_rows if skipping else rows, slots)
            positions = "position_ids"
            if is_last:
                normed, hidden = g.rows(normed, *last, name="last_normed"), g.rows(hidden, *last, name="last_row")
                positions = g.rows("position_ids", *last, name="last_position")
                mask = _mask(g, positions, "last_mask")
            query = g.query(normed, layer, positions)
            hidden = g.after_attention(hidden, g.attend(query, rows["key"], rows["value"], mask), layer)
            if is_last or not skipping:
                hidden = g.feed_forward(hidden, layer)
            else:
                kept = g.feed_forward(g.rows(hidden, 0, num_kept, name="kept"), layer)
                hidden = g.op("Concat", kept, g.rows(hidden, num_kept, name="skipped"), name="joined", axis=1)
    return g.logits(hidden)


def prompt_rows(g: DecoderGraph) -> str:
    """[1, L, D] in memory order: `source` picks from the text embeddings and the visual rows behind them."""
    with g.scope("prompt"):
        visual = g.op("Reshape", "visual", g.ints(1, -1, g.text.hidden_size), name="visual_rows")
        table = g.op("Concat", g.embed(), visual, name="table", axis=1)
        return g.op("TokenGather", table, "source", name="hidden")


def _mask(g: DecoderGraph, query_positions: str, name: str) -> str:
    """[1, 1, n, L] bool: key position <= query position <= how long the key is visible."""
    query = g.op("Unsqueeze", query_positions, g.ints(1, 3), name=f"{name}.query")
    key = g.op("Unsqueeze", "position_ids", g.ints(1, 2), name=f"{name}.key")
    until = g.op("Unsqueeze", "visible_until", g.ints(1, 2), name=f"{name}.until")
    causal = g.op("LessOrEqual", key, query, name=f"{name}.causal")
    return g.op("And", causal, g.op("LessOrEqual", query, until, name=f"{name}.visible"), name=name)


def decode_graph(config: ModelConfig, contract: Contract, weights: WeightFile) -> onnx.ModelProto:
    """n new ids behind the cache. Each attends to the rows in use up to itself."""
    g = DecoderGraph("decode", config, contract, weights)
    hidden = g.embed()
    width = g.text.num_heads * g.text.head_dim
    num_new = g.op("Shape", "input_ids", name="num_new", start=1, end=2)
    slots = g.slots("write_index", num_new)
    own_slots = g.op("Unsqueeze", slots, g.ints(0, 1, 3), name="own_slots")
    length = g.op("Add", "write_index", num_new, name="length")
    all_slots = g.constant(np.arange(contract.capacity, dtype=np.int64).reshape(1, 1, -1, 1), "all_slots")
    used_slots = g.op(
        "Transpose", g.op("CacheRead", all_slots, length, name="used"), name="used_slots", perm=[0, 1, 3, 2]
    )
    mask = g.op("LessOrEqual", used_slots, own_slots, name="mask")
    for layer in range(config.text.num_layers):
        with g.scope(f"decoder.layers.{layer}"):
            normed = g.norm(hidden, f"decoder.layers.{layer}.norm1")
            buffers = g.write_cache(layer, g.key_value(normed, layer, "position_ids"), slots)
            keys, values = (g.op("CacheRead", buffer, length, name="used") for buffer in buffers)
            query = g.heads(g.query(normed, layer, "position_ids"), g.text.num_heads, "query_heads")
            mixed = g.op("Attention", query, keys, values, mask, name="attention")
            merged = g.op("Transpose", mixed, name="mixed", perm=[0, 2, 1, 3])
            rows = g.op("Reshape", merged, g.ints(1, -1, width), name="mixed_rows")
            hidden = g.feed_forward(g.after_attention(hidden, rows, layer), layer)
    return g.logits(g.rows(hidden, -1, name="last_row"))
