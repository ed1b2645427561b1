"""Chain-of-Sight's resampler in the `vision` graph.

Shapes: I images, P patches, D width of the encoder, W windows of a scale, K patches of a window, Q its queries.
"""

from __future__ import annotations

from skipvision.config import ModelConfig
from svcli_export.builder import GraphBuilder

_EPSILON = 1e-5  # of nn.LayerNorm, torch's default


def resample(g: GraphBuilder, config: ModelConfig, features: str) -> str:
    """Tokens [I, T, D of the decoder] from features [I, P, F], in the scope of the projector."""
    resampler = config.resampler
    assert resampler is not None
    grid, num_levels = config.vision.grid, len(config.vision.feature_layers)
    levels = [f"level_{number}" for number in range(num_levels)]
    patches = (
        g.multi("Split", features, names=levels, axis=-1, num_outputs=num_levels) if num_levels > 1 else [features]
    )
    num_images = g.op("Shape", features, name="num_images", start=0, end=1)
    scales = []
    for scale, count in enumerate(resampler.token_counts(grid)):
        queries = _learned(g, config, scale, num_images)
        for level in range(num_levels):
            with g.scope(f"levels.{level}.{scale}"):
                queries = _look(g, config, queries, patches[level], level, scale)
        scales.append(g.op("Reshape", queries, g.ints(-1, count, config.vision.hidden_size), name=f"scale_{scale}"))
    together = g.op("Concat", *scales, name="scales", axis=1) if len(scales) > 1 else scales[0]
    return g.linear(g.layer_norm(together, "projector.norm", _EPSILON), "projector.output")


def _learned(g: GraphBuilder, config: ModelConfig, scale: int, num_images: str) -> str:
    """The learned queries of a scale, the same for every image: [I*W, Q, D]."""
    assert config.resampler is not None
    count, width = config.resampler.token_counts(config.vision.grid)[scale], config.vision.hidden_size
    shape = g.op("Concat", num_images, g.ints(count, width), name=f"queries_{scale}_shape", axis=0)
    repeated = g.op("Expand", g.weight(f"projector.queries.{scale}"), shape, name=f"queries_{scale}_repeated")
    return g.op("Reshape", repeated, g.ints(-1, config.resampler.queries[scale], width), name=f"queries_{scale}")


def _look(g: GraphBuilder, config: ModelConfig, queries: str, patches: str, level: int, scale: int) -> str:
    """Queries [I*W, Q, D] after a look at their windows of the patches [I, P, D]."""
    assert config.resampler is not None
    name, heads = f"projector.levels.{level}.{scale}", config.resampler.num_heads
    both = g.linear(g.layer_norm(patches, f"{name}.norm_patches", _EPSILON), f"{name}.kv")
    windows = _windows(g, both, config.vision.grid, config.resampler.windows[scale], 2 * config.vision.hidden_size)
    key, value = g.multi("Split", windows, names=["key", "value"], axis=-1, num_outputs=2)
    query = g.linear(g.layer_norm(queries, f"{name}.norm_query", _EPSILON), f"{name}.q")
    mixed = g.op("Attention", query, key, value, name="attention", q_num_heads=heads, kv_num_heads=heads)
    queries = g.op("Add", queries, g.linear(mixed, f"{name}.out"), name="after_attention")
    grown = g.op("Gelu", g.linear(g.layer_norm(queries, f"{name}.norm_mlp", _EPSILON), f"{name}.fc1"))
    return g.op("Add", queries, g.linear(grown, f"{name}.fc2"), name="after_mlp")


def _windows(g: GraphBuilder, patches: str, grid: int, side: int, channels: int) -> str:
    """[I, P, C] to [I*W, K, C]; a window that is the whole grid needs no move."""
    if side == grid:
        return patches
    count = grid // side
    lines = g.op("Reshape", patches, g.ints(-1, side, count, side * channels), name="lines")
    squares = g.op("Transpose", lines, name="squares", perm=[0, 2, 1, 3])
    return g.op("Reshape", squares, g.ints(-1, side**2, channels), name="windows")
