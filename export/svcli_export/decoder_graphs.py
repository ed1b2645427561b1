"""The `prefill` and `decode` graphs: a Llama-type decoder that writes reduced K and V into fixed buffers.

Shapes: B sequences (1 in prefill), T ids, L rows of a prompt, K of them kept and S skipped, n new rows, w rows in the
cache before them, D width, H heads, G KV heads, d head size, C cache capacity.
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
        """Text embeddings [B, T, D]. The table is stored [D, V] for the tied head, so ids pick columns."""
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
        """RoPE on [B, n, heads*d] at `positions` [B, n]."""
        tables = self.weight(ROPE_COS), self.weight(ROPE_SIN)
        return self.op("RotaryEmbedding", heads, *tables, positions, name=name, num_heads=num_heads)

    def key_value(self, normed: str, layer: int, positions: str) -> dict[CachePart, str]:
        """Rotated key and value of one layer, both [B, n, G*d]."""
        module = f"decoder.layers.{layer}.attention"
        key = self.linear(normed, f"{module}.k", bias=self.text.qkv_bias)
        rotated = self.rotate(key, positions, self.text.num_kv_heads, "attention.k_rotated")
        return {"key": rotated, "value": self.linear(normed, f"{module}.v", bias=self.text.qkv_bias)}

    def query(self, normed: str, layer: int, positions: str) -> str:
        """Rotated query [B, n, H*d]."""
        query = self.linear(normed, f"decoder.layers.{layer}.attention.q", bias=self.text.qkv_bias)
        return self.rotate(query, positions, self.text.num_heads, "attention.q_rotated")

    def heads(self, flat: str, num_heads: int, name: str) -> str:
        """[B, n, heads*d] to [B, heads, n, d]."""
        shape = self.ints(0, -1, num_heads, self.text.head_dim)
        return self.op("Transpose", self.op("Reshape", flat, shape, name=f"{name}_rows"), name=name, perm=[0, 2, 1, 3])

    def slots(self, first: str, count: str) -> str:
        """Cache rows [B, n]: `first` [B] and those behind it; `count` [1] is n."""
        zero, one = self.constant(np.array(0), "zero"), self.constant(np.array(1), "one")
        offsets = self.op("Range", zero, self.op("Squeeze", count, name="count"), one, name="offsets")
        return self.op("Add", self.op("Unsqueeze", first, self.ints(1), name="first_slot"), offsets, name="slots")

    def used_slots(self, length: str) -> str:
        """[1, 1, 1, `length`]: the numbers of the rows that `write_cache` returns."""
        every = self.constant(np.arange(self.contract.capacity, dtype=np.int64).reshape(1, 1, -1, 1), "all_slots")
        return self.op(
            "Transpose", self.op("CacheRead", every, length, name="used"), name="used_slots", perm=[0, 1, 3, 2]
        )

    def write_cache(self, layer: int, rows: dict[CachePart, str], slots: str, length: str) -> list[str]:
        """Puts key and value `rows` [B, n, G*d] at `slots` [B, n] of the layer's buffers.

        Returns the first `length` rows of either, [B, G, length, d].
        """
        used = []
        for part, flat in rows.items():
            update = self.heads(flat, self.text.num_kv_heads, f"{part}_heads")
            buffer = self.op("CacheWrite", past_name(layer, part), update, slots, name=f"{part}_cache")
            self.caches[present_name(layer, part)] = buffer
            used.append(self.op("CacheRead", buffer, length, name="used"))
        return used

    def attend(self, query: str, keys: str, values: str, mask: str) -> str:
        """[B, n, H*d] of `query` [B, n, H*d], which looks at m rows [B, G, m, d]; `mask` [B, 1, n, m] bool."""
        heads = self.heads(query, self.text.num_heads, "query_heads")
        mixed = self.op("Attention", heads, keys, values, mask, name="attention")
        rows = self.op("Transpose", mixed, name="mixed", perm=[0, 2, 1, 3])
        return self.op("Reshape", rows, self.ints(0, -1, self.text.num_heads * self.text.head_dim), name="mixed_rows")

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
        """Ends the graph: `row` [B, 1, D] to logits [B, vocab] in fp32."""
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
    """All rows of a prompt at once, behind w rows of the cache, of which there may be none.

    Rows are in memory order, kept rows first, so the FFN stream is a slice. They attend to the cache, in which the kept
    ones are by then, and to the skipped ones beside it. In the last layer only the last kept row is asked for, and only
    it is computed beyond K and V.
    """
    g = DecoderGraph("prefill", config, contract, weights)
    hidden = _prompt_rows(g)
    skipping = "kept_index" in g.spec.input_names
    num_kept = g.op("Shape", "kept_index" if skipping else "position_ids", name="num_kept", start=1, end=2)
    last = g.op("Sub", num_kept, g.ints(1), name="last_kept"), num_kept
    slots, length = g.slots("write_index", num_kept), g.op("Add", "write_index", num_kept, name="length")
    used_slots = g.used_slots(length)
    mask = _mask(g, "position_ids", num_kept, used_slots) if config.text.num_layers > 1 else ""
    for layer in range(config.text.num_layers):
        is_last = layer == config.text.num_layers - 1
        with g.scope(f"decoder.layers.{layer}"):
            normed = g.norm(hidden, f"decoder.layers.{layer}.norm1")
            rows = kept = g.key_value(normed, layer, "position_ids")
            if skipping:
                kept = {part: g.op("TokenGather", flat, "kept_index", name="kept_rows") for part, flat in rows.items()}
            keys, values = g.write_cache(layer, kept, slots, length)
            if skipping:
                keys, values = (
                    g.op("Concat", cached, _skipped(g, flat, num_kept), name="attended", axis=2)
                    for cached, flat in zip((keys, values), rows.values(), strict=True)
                )
            positions = "position_ids"
            if is_last:
                normed, hidden = g.rows(normed, *last, name="last_normed"), g.rows(hidden, *last, name="last_row")
                positions = g.rows("position_ids", *last, name="last_position")
                mask = _mask(g, positions, num_kept, used_slots)
            mixed = g.attend(g.query(normed, layer, positions), keys, values, mask)
            hidden = g.after_attention(hidden, mixed, layer)
            if is_last or not skipping:
                hidden = g.feed_forward(hidden, layer)
            else:
                grown = g.feed_forward(g.rows(hidden, 0, num_kept, name="kept"), layer)
                hidden = g.op("Concat", grown, g.rows(hidden, num_kept, name="skipped"), name="joined", axis=1)
    return g.logits(hidden)


def _prompt_rows(g: DecoderGraph) -> str:
    """[1, L, D] in memory order: `source` picks from the text embeddings and the visual rows behind them."""
    with g.scope("prompt"):
        visual = g.op("Reshape", "visual", g.ints(1, -1, g.text.hidden_size), name="visual_rows")
        table = g.op("Concat", g.embed(), visual, name="table", axis=1)
        return g.op("TokenGather", table, "source", name="hidden")


def _skipped(g: DecoderGraph, flat: str, num_kept: str) -> str:
    """[1, G, S, d] of [1, L, G*d]."""
    return g.heads(g.rows(flat, num_kept, name="skipped_rows"), g.text.num_kv_heads, "skipped_heads")


def _mask(g: DecoderGraph, query_positions: str, num_kept: str, used_slots: str) -> str:
    """[1, 1, n, w + K + S] bool.

    Kept rows are in ascending order and never hidden, so a row sees of the cache all that was there, and as many of
    the new ones as have no later position than it has itself. A skipped row is seen as long as it is visible.
    """
    with g.scope("mask"):
        query = g.op("Unsqueeze", query_positions, g.ints(1, 3), name="query")
        kept = g.op("Unsqueeze", g.rows("position_ids", 0, num_kept, name="kept_positions"), g.ints(1, 2), name="kept")
        before = g.op("LessOrEqual", kept, query, name="before")
        counted = g.op("ReduceSum", g.op("Cast", before, to=onnx.TensorProto.INT64), g.ints(3), name="num_before")
        cached = g.op("Less", used_slots, g.op("Add", counted, "write_index", name="end"), name="cached")
        if "visible_until" not in g.spec.input_names:
            return cached
        bounds = [
            g.op("Unsqueeze", g.rows(name, num_kept, name="of_skipped"), g.ints(1, 2), name="bound")
            for name in ("position_ids", "visible_until")
        ]
        begun = g.op("LessOrEqual", bounds[0], query, name="begun")
        visible = g.op("And", begun, g.op("LessOrEqual", query, bounds[1], name="not_over"), name="skipped")
        return g.op("Concat", cached, visible, name="visible", axis=3)


def decode_graph(config: ModelConfig, contract: Contract, weights: WeightFile) -> onnx.ModelProto:
    """n new ids behind the cache of each sequence. Each attends to the rows of its own sequence up to itself."""
    g = DecoderGraph("decode", config, contract, weights)
    hidden = g.embed()
    num_new = g.op("Shape", "input_ids", name="num_new", start=1, end=2)
    slots = g.slots("write_index", num_new)
    longest = g.op("ReduceMax", "write_index", g.ints(0), name="longest")
    length = g.op("Add", longest, num_new, name="length")
    own_slots = g.op("Unsqueeze", slots, g.ints(1, 3), name="own_slots")
    mask = g.op("LessOrEqual", g.used_slots(length), own_slots, name="mask")
    for layer in range(config.text.num_layers):
        with g.scope(f"decoder.layers.{layer}"):
            normed = g.norm(hidden, f"decoder.layers.{layer}.norm1")
            keys, values = g.write_cache(layer, g.key_value(normed, layer, "position_ids"), slots, length)
            mixed = g.attend(g.query(normed, layer, "position_ids"), keys, values, mask)
            hidden = g.feed_forward(g.after_attention(hidden, mixed, layer), layer)
    return g.logits(g.rows(hidden, -1, name="last_row"))
