"""The graph contract as values: names, shapes and dtypes of everything that goes in and out. Imports no torch.

Exporter, check, engines, `svcli inspect` and the table in export/README.md all read it from here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from skipvision.config import ModelConfig
from skipvision.layout import ImageSpan, largest_spans
from skipvision.tiles import most_tokens

Precision = Literal["fp32", "fp16", "int8", "int4"]
DType = Literal["float32", "float16", "int64"]
GraphName = Literal["vision", "prefill", "decode"]
CachePart = Literal["key", "value"]

OPSET = 23
"""The newest that ONNX Runtime 1.23 reads, the last one for Python 3.10."""
CUSTOM_DOMAIN = "svcli"
NUM_SEQUENCES = "num_sequences"
"""The free dimension of decode: sequences side by side, each with a cache of its own."""
RETAINED = "retained"
MOSAIC_INDEX, MOSAIC_WEIGHT = "mosaic_index", "mosaic_weight"
CACHE_PARTS: tuple[CachePart, ...] = ("key", "value")
_BYTES = {"float32": 4, "float16": 2, "int64": 8}


class ContractError(ValueError):
    """Limits of context or images that cannot work; the message has the numbers."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Frozen):
    """One graph input or output. A string in `shape` is a dimension that is free at run time."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]
    meaning: str


class GraphSpec(_Frozen):
    """One graph."""

    name: GraphName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    variant: str = ""
    """Of which variant of a bundle; empty where it is none of a variant's."""

    @property
    def file(self) -> str:
        return f"{self.variant}.{self.name}.onnx" if self.variant else f"{self.name}.onnx"

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.outputs)


class Contract(_Frozen):
    """What the three graphs agree on, and what the KV cache costs."""

    precision: Precision
    max_context: int
    """Rows of one conversation as the plain model counts them."""
    max_images: int
    capacity_full: int
    """KV rows that the plain model needs."""
    capacity: int
    """KV rows that are baked into prefill and decode: skipped rows are never stored."""
    max_positions: int
    """Position ids reach further than `capacity`, since skipped rows keep theirs."""
    num_layers: int
    num_kv_heads: int
    head_dim: int
    graphs: tuple[GraphSpec, ...]

    def graph(self, name: GraphName) -> GraphSpec:
        return next(graph for graph in self.graphs if graph.name == name)

    def of_variant(self, name: str) -> Contract:
        """The same in the graph files of a variant."""
        graphs = tuple(graph.model_copy(update={"variant": name}) for graph in self.graphs)
        return self.model_copy(update={"graphs": graphs})

    @property
    def variant(self) -> str:
        """Whose graphs they are; empty where they are none of a variant's."""
        return self.graphs[0].variant

    @property
    def compute_dtype(self) -> DType:
        return compute_dtype(self.precision)

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """[1, G, C, d] of K, and of V, in each layer."""
        return 1, self.num_kv_heads, self.capacity, self.head_dim

    @property
    def kv_bytes_per_row(self) -> int:
        """K and V of one row, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * _BYTES[self.compute_dtype]


def compute_dtype(precision: Precision) -> DType:
    """dtype of activations and of the KV cache; int8 and int4 are the storage of weights only."""
    return "float16" if precision == "fp16" else "float32"


def past_name(layer: int, part: CachePart) -> str:
    return f"past_key_values.{layer}.{part}"


def present_name(layer: int, part: CachePart) -> str:
    return f"present.{layer}.{part}"


def build_contract(config: ModelConfig, max_context: int, max_images: int, precision: Precision) -> Contract:
    """The contract of a model.

    Raises ContractError where pictures leave no room for text, or for more positions than the model was made for.
    """
    spans, text, tokens = largest_spans(config), config.text, most_tokens(config)
    capacity = max_context - max_images * (tokens - sum(span.num_kept for span in spans))
    max_positions = capacity + max_images * sum(span.num_skipped for span in spans)
    if max_images < 1:
        raise ContractError(f"max_images must be at least 1, not {max_images}")
    if max_context <= max_images * tokens:
        raise ContractError(
            f"max_context {max_context} leaves no room for text beside {max_images} x {tokens} visual tokens;"
            f" ask for more than {max_images * tokens}"
        )
    if text.max_positions and max_positions > text.max_positions:
        raise ContractError(
            f"max_context {max_context} needs {max_positions} positions, and the model was made for"
            f" {text.max_positions}; ask for less"
        )
    return Contract(
        precision=precision,
        max_context=max_context,
        max_images=max_images,
        capacity_full=max_context,
        capacity=capacity,
        max_positions=max_positions,
        num_layers=text.num_layers,
        num_kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        graphs=(
            _vision(config, precision),
            _prefill(config, capacity, precision),
            _decode(config, capacity, precision),
        ),
    )


def _vision(config: ModelConfig, precision: Precision) -> GraphSpec:
    size, tiles = config.vision.image_size, config.tiles
    is_joined = tiles is not None and tiles.is_joined
    views = "num_views" if is_joined else "num_images"
    inputs = [
        TensorSpec(
            name="pixels",
            dtype="float32",
            shape=(views, 3, size, size),
            meaning="normalised by the manifest's values" + ("; one picture, thumbnail first" if is_joined else ""),
        )
    ]
    if tiles is not None and is_joined:
        taken = 4 if tiles.max_tiles else 1
        places = "rows of the table of all views' tokens, and last the newline, that each token is taken from"
        inputs.append(TensorSpec(name=MOSAIC_INDEX, dtype="int64", shape=(taken, "num_tokens"), meaning=places))
        if tiles.max_tiles:
            meaning = "shares of those rows in the token"
            inputs.append(TensorSpec(name=MOSAIC_WEIGHT, dtype="float32", shape=(taken, "num_tokens"), meaning=meaning))
    visual = _visual(config, precision, "visual rows in attention order: retained, summary, skipped, summary")
    outputs = [visual]
    if config.skip is not None and config.skip.selector != "first":
        shape = (visual.shape[0], config.skip.num_retained)
        outputs.append(
            TensorSpec(name=RETAINED, dtype="int64", shape=shape, meaning="tokens that were retained, in raster order")
        )
    return GraphSpec(name="vision", inputs=tuple(inputs), outputs=tuple(outputs))


def _visual(config: ModelConfig, precision: Precision, meaning: str) -> TensorSpec:
    """Runs of equal length side by side; or else, of joined tiles, one behind the other."""
    is_joined = config.tiles is not None and config.tiles.is_joined
    shape = (1, "num_visual") if is_joined else ("num_images", ImageSpan.of(config).length)
    return TensorSpec(
        name="visual", dtype=compute_dtype(precision), shape=(*shape, config.text.hidden_size), meaning=meaning
    )


def _prefill(config: ModelConfig, capacity: int, precision: Precision) -> GraphSpec:
    placeholders = (
        "one placeholder id per image" if config.tiles is None else "one placeholder id per run of visual rows"
    )
    inputs = [
        TensorSpec(name="input_ids", dtype="int64", shape=(1, "num_ids"), meaning=placeholders),
        _visual(config, precision, "from `vision`; none for text only"),
        TensorSpec(
            name="source",
            dtype="int64",
            shape=(1, "num_rows"),
            meaning="row of the table (text, then visual) for each row in memory order: kept rows first",
        ),
        TensorSpec(
            name="position_ids",
            dtype="int64",
            shape=(1, "num_rows"),
            meaning="place in attention order, behind all positions before",
        ),
    ]
    if config.num_skipped:
        until, kept = "last position that may look at a skipped row", "rows that survive in the KV cache"
        inputs.append(TensorSpec(name="visible_until", dtype="int64", shape=(1, "num_rows"), meaning=until))
        inputs.append(TensorSpec(name="kept_index", dtype="int64", shape=(1, "num_kept"), meaning=kept))
    inputs.append(
        TensorSpec(name="write_index", dtype="int64", shape=(1,), meaning="rows in the cache, which all rows look at")
    )
    past, present = _caches(config, capacity, precision, "kept rows behind write_index")
    return GraphSpec(name="prefill", inputs=(*inputs, *past), outputs=(_logits(config), *present))


def _decode(config: ModelConfig, capacity: int, precision: Precision) -> GraphSpec:
    inputs = (
        TensorSpec(
            name="input_ids", dtype="int64", shape=(NUM_SEQUENCES, "num_new"), meaning="new ids behind the cache"
        ),
        TensorSpec(
            name="position_ids", dtype="int64", shape=(NUM_SEQUENCES, "num_new"), meaning="skipped rows keep theirs"
        ),
        TensorSpec(name="write_index", dtype="int64", shape=(NUM_SEQUENCES,), meaning="rows in the cache"),
    )
    past, present = _caches(config, capacity, precision, "new rows behind write_index", NUM_SEQUENCES)
    return GraphSpec(name="decode", inputs=(*inputs, *past), outputs=(_logits(config, NUM_SEQUENCES), *present))


def _logits(config: ModelConfig, num_sequences: int | str = 1) -> TensorSpec:
    shape = num_sequences, config.text.vocab_size
    return TensorSpec(name="logits", dtype="float32", shape=shape, meaning="of the last row")


def _caches(
    config: ModelConfig, capacity: int, precision: Precision, written: str, num_sequences: int | str = 1
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    shape, dtype = (num_sequences, config.text.num_kv_heads, capacity, config.text.head_dim), compute_dtype(precision)
    past, present = [], []
    for layer in range(config.text.num_layers):
        for part in CACHE_PARTS:
            before, after = past_name(layer, part), present_name(layer, part)
            past.append(TensorSpec(name=before, dtype=dtype, shape=shape, meaning="cache before"))
            present.append(TensorSpec(name=after, dtype=dtype, shape=shape, meaning=f"same buffer: {written}"))
    return past, present


def markdown_table(contract: Contract) -> str:
    """The graphs as a Markdown table; layers beyond the first are left out."""
    lines = ["| graph | | name | dtype | shape | meaning |", "|---|---|---|---|---|---|"]
    for graph in contract.graphs:
        for direction, tensors in (("in", graph.inputs), ("out", graph.outputs)):
            for tensor in tensors:
                layer = tensor.name.split(".")[1:2]
                if layer and layer != ["0"]:
                    continue
                name, shape = tensor.name.replace(".0.", ".N."), ", ".join(map(str, tensor.shape))
                lines.append(
                    f"| {graph.name} | {direction} | `{name}` | {tensor.dtype} | [{shape}] | {tensor.meaning} |"
                )
    return "\n".join(lines) + "\n"
