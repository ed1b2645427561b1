"""Skip-Vision once more, as plainly as it can be said: what the tests hold the package against.

Nothing of the package is used but weights and sizes. numpy in fp64, one row and one head at a time, attention order
throughout: two lists of rows, `h` (FFN stream) and `s` (skipped), are joined in front of every attention and split
behind it. No cache: a continuation is computed anew from the first row, which by causality is the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from skipvision.config import ModelConfig, TextConfig, VisionConfig
from skipvision.tiles import Cut

Array = npt.NDArray[np.float64]
Weights = Mapping[str, Array]

TEXT, RETAINED, SUMMARY, SKIPPED = "text", "retained", "summary", "skipped"


@dataclass(frozen=True)
class Row:
    """One row in attention order."""

    vector: Array
    kind: str
    image: int | None = None


@dataclass
class Trace:
    """What a forward pass went through, by place in attention order."""

    logits: dict[int, Array] = field(default_factory=dict)
    """Of the rows that are not skipped."""
    keys: list[list[Array]] = field(default_factory=list)
    """Per layer and row [G, d], rotated."""
    skipped: list[list[Array]] = field(default_factory=list)
    """The skipped rows before layer 0 and behind every layer."""


def weights_of(model: nn.Module) -> Weights:
    return {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}


# --- small parts ---------------------------------------------------------------------------------------------------


def linear(weights: Weights, name: str, row: Array) -> Array:
    out: Array = weights[f"{name}.weight"] @ row
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def softmax(scores: Sequence[float] | Array) -> Array:
    powers = np.exp(np.array(scores, dtype=np.float64) - max(scores))
    return np.asarray(powers / powers.sum())


def rms_norm(row: Array, weight: Array, eps: float) -> Array:
    return row / math.sqrt(float((row**2).mean()) + eps) * weight


def layer_norm(row: Array, weight: Array | float, bias: Array | float, eps: float) -> Array:
    centred = row - row.mean()
    return np.asarray(centred / math.sqrt(float((centred**2).mean()) + eps) * weight + bias)


def gelu(row: Array) -> Array:
    return np.array([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in row])


def quick_gelu(row: Array) -> Array:
    return np.array([x / (1 + math.exp(-1.702 * x)) for x in row])


def gelu_tanh(row: Array) -> Array:
    return np.array([0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) for x in row])


ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu, "gelu_tanh": gelu_tanh}


def silu(row: Array) -> Array:
    return np.asarray(row / (1 + np.exp(-row)))


def rotate(row: Array, position: int, theta: float) -> Array:
    """RoPE: element i and its partner half a head on are one complex number, turned by position * theta^(-2i/d)."""
    half = len(row) // 2
    turned = [
        complex(row[i], row[i + half]) * complex(math.cos(angle), math.sin(angle))
        for i in range(half)
        for angle in [position * theta ** (-2 * i / len(row))]
    ]
    return np.array([z.real for z in turned] + [z.imag for z in turned])


# --- vision --------------------------------------------------------------------------------------------------------


def encode(
    weights: Weights, config: VisionConfig, pixels: Array, ranked_by: str = "cls_attention"
) -> tuple[Array, Array]:
    """One picture [3, H, W] to patch features [P, F], and what is paid to each patch [P].

    By CLS, summed over heads; or (`received_attention`) by all rows, as a mean over them, summed over heads.
    """
    side, width, first = config.patch_size, config.hidden_size, 1 if config.has_cls else 0
    kernel = weights["vision.patch_embed.weight"].reshape(width, -1)
    hidden = [weights["vision.cls_token"]] if config.has_cls else []
    for y in range(config.grid):
        for x in range(config.grid):
            patch = pixels[:, y * side : (y + 1) * side, x * side : (x + 1) * side]
            hidden.append(kernel @ patch.reshape(-1) + weights["vision.patch_embed.bias"])
    hidden = [row + place for row, place in zip(hidden, weights["vision.position"], strict=True)]
    if config.embedding_norm:
        hidden = [_normed(weights, "vision.norm", row, config.layer_norm_eps) for row in hidden]
    states, paid = [hidden], np.zeros(len(hidden))
    for layer in range(config.num_layers):
        name, eps = f"vision.blocks.{layer}", config.layer_norm_eps
        normed = [_normed(weights, f"{name}.norm1", row, eps) for row in hidden]
        qkv = [linear(weights, f"{name}.qkv", row).reshape(3, config.num_heads, -1) for row in normed]
        mixed = np.zeros((len(hidden), config.num_heads, width // config.num_heads))
        for head in range(config.num_heads):
            for row in range(len(hidden)):
                scores = [float(qkv[row][0, head] @ other[1, head]) / math.sqrt(mixed.shape[2]) for other in qkv]
                shares = softmax(scores)
                mixed[row, head] = sum(share * other[2, head] for share, other in zip(shares, qkv, strict=True))
                if layer + 1 == config.select_layer and ranked_by == "received_attention":
                    paid += shares / len(hidden)
                elif layer + 1 == config.select_layer and config.has_cls and row == 0:
                    paid += shares
        hidden = [row + linear(weights, f"{name}.out", mix.reshape(-1)) for row, mix in zip(hidden, mixed, strict=True)]
        normed = [_normed(weights, f"{name}.norm2", row, eps) for row in hidden]
        grown = [ACTIVATIONS[config.activation](linear(weights, f"{name}.fc1", row)) for row in normed]
        hidden = [row + linear(weights, f"{name}.fc2", more) for row, more in zip(hidden, grown, strict=True)]
        states.append(hidden)
    if config.output_norm:
        states[-1] = [_normed(weights, "vision.output_norm", row, config.layer_norm_eps) for row in hidden]
    features = []
    for number in range(first, len(hidden)):
        read = [states[layer][number] for layer in config.feature_layers]
        features.append(
            np.concatenate([layer_norm(row, 1.0, 0.0, 1e-5) for row in read] if config.feature_norm else read)
        )
    return np.array(features), paid[first:]


def _normed(weights: Weights, name: str, row: Array, eps: float) -> Array:
    return layer_norm(row, weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def squares(grid: int, side: int) -> list[list[int]]:
    """The patches of each square of `side` by `side`, squares and patches in raster order (pixel shuffle)."""
    return [
        [(top + y) * grid + left + x for y in range(side) for x in range(side)]
        for top in range(0, grid, side)
        for left in range(0, grid, side)
    ]


def mix_neighbours(weights: Weights, name: str, patches: list[Array], grid: int) -> list[Array]:
    """Each patch plus the gelu of a 3x3 convolution around it; nothing lies outside the grid."""
    kernel, out = weights[f"{name}.weight"], []
    for patch, row in enumerate(patches):
        y, x = divmod(patch, grid)
        total = weights[f"{name}.bias"]
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if 0 <= y + dy < grid and 0 <= x + dx < grid:
                    total = total + kernel[:, :, 1 + dy, 1 + dx] @ patches[(y + dy) * grid + x + dx]
        out.append(row + gelu(total))
    return out


def project(weights: Weights, config: ModelConfig, features: Array) -> Array:
    """[P, F] to tokens [T, D]."""
    out = []
    features = np.array(
        [
            np.concatenate([features[patch] for patch in square])
            for square in squares(config.vision.grid, config.pixel_shuffle)
        ]
    )
    if config.projector == "linear":
        return np.array([linear(weights, "projector.matrix", row) for row in features])
    hidden = [gelu(linear(weights, "projector.fc1", row)) for row in features]
    for number in range(config.projector_convs):
        hidden = mix_neighbours(weights, f"projector.convs.{number}", hidden, config.vision.grid)
    for patch, row in enumerate(hidden):
        token = linear(weights, "projector.fc2", row)
        if config.projector_norm:
            token = layer_norm(token, weights["projector.norm.weight"], weights["projector.norm.bias"], 1e-5)
        if config.projector_position:
            y, x = divmod(patch, config.vision.grid)
            token = token + weights["projector.rows"][y] + weights["projector.columns"][x]
        out.append(token)
    return np.array(out)


# --- tiles that are joined -----------------------------------------------------------------------------------------


def join(
    weights: Weights, config: ModelConfig, cut: Cut, views: Sequence[Array], paid: Sequence[Array]
) -> tuple[Array, Array]:
    """The tokens [N, D] of all views of one picture, and what is paid to each [N], as one run.

    The thumbnail, then the mosaic of tiles line by line, a newline behind each line. What padding alone shows is left
    out: a line or column of patches at either end, as long as they come in pairs. To a newline nothing is paid.
    """
    newline = np.append(weights["newline"], 0.0)
    seen = [np.hstack([tokens, scores[:, None]]) for tokens, scores in zip(views, paid, strict=True)]
    if not cut.rows:
        rows = [*seen[0], newline]
        return np.array(rows)[:, :-1], np.array(rows)[:, -1]
    grid = config.vision.grid
    mosaic = [
        [
            seen[1 + line // grid * cut.columns + column // grid][line % grid * grid + column % grid]
            for column in range(cut.columns * grid)
        ]
        for line in range(cut.rows * grid)
    ]
    scale = min(len(mosaic[0]) / cut.width, len(mosaic) / cut.height)
    if cut.width * len(mosaic) > cut.height * len(mosaic[0]):
        while len(mosaic) - int(round(cut.height * scale, 7)) >= 2:
            mosaic = mosaic[1:-1]
    else:
        while len(mosaic[0]) - int(round(cut.width * scale, 7)) >= 2:
            mosaic = [line[1:-1] for line in mosaic]
    if config.tiles is not None and config.tiles.max_tiles:
        mosaic = shrink(mosaic, config.tiles.max_tiles * grid**2)
    rows = [*seen[0], *(row for line in mosaic for row in [*line, newline])]
    return np.array(rows)[:, :-1], np.array(rows)[:, -1]


def shrink(mosaic: list[list[Array]], most: int) -> list[list[Array]]:
    """With more than `most` tokens (and a fifth on top): read in between at fewer places, evenly and linearly."""
    ratio = math.sqrt(len(mosaic) * len(mosaic[0]) / most)
    if ratio <= 1.1:
        return mosaic
    lines, columns = int(len(mosaic) // ratio), int(len(mosaic[0]) // ratio)

    def between(rows: Sequence[Any], place: int, count: int) -> Any:
        centre = min(max((place + 0.5) * len(rows) / count - 0.5, 0), len(rows) - 1)
        before = int(centre)
        after = min(before + 1, len(rows) - 1)
        return np.array(rows[before]) * (1 - (centre - before)) + np.array(rows[after]) * (centre - before)

    fewer = [between(mosaic, line, lines) for line in range(lines)]
    return [[between(line, column, columns) for column in range(columns)] for line in fewer]


# --- the three choices of Skip-Vision ------------------------------------------------------------------------------


def select(scores: Sequence[float] | Array, num_retained: int) -> tuple[list[int], list[int]]:
    """The best-scored patches and the others, both in raster order."""
    ranked = sorted(range(len(scores)), key=lambda patch: -scores[patch])
    return sorted(ranked[:num_retained]), sorted(ranked[num_retained:])


def ranking(selector: str, paid: Array, num_retained: int, num_thumbnail: int, drawn: Array | None = None) -> Array:
    """Scores of the tokens of one run. `drawn`: what a random selector draws."""
    if selector == "random":
        assert drawn is not None
        return drawn
    taken: set[int] | None = None
    if selector == "uniform":
        taken = {number * len(paid) // num_retained for number in range(num_retained)}
    if selector == "first":
        taken = set(range(num_thumbnail))
    return paid if taken is None else np.array([float(token in taken) for token in range(len(paid))])


def merge(tokens: Array, num_merged: int) -> Array:
    """The one-shot merge: [N, D] to [M, D], in order of decreasing redundancy."""
    if num_merged == len(tokens):
        return tokens
    unit = [token / max(float(np.sqrt((token**2).sum())), 1e-6) for token in tokens]
    likeness = [[float(a @ b) for b in unit] for a in unit]
    redundancy = [sum(likeness[i][j] for j in range(len(tokens)) if j != i) for i in range(len(tokens))]
    order = sorted(range(len(tokens)), key=lambda i: -redundancy[i])
    sources, targets = order[: len(tokens) - num_merged], order[len(tokens) - num_merged :]
    clusters = {target: [tokens[target]] for target in targets}
    for source in sources:
        clusters[max(targets, key=lambda target: likeness[source][target])].append(tokens[source])
    return np.array([sum(clusters[target]) / len(clusters[target]) for target in targets])


def summarise(weights: Weights, tokens: Array) -> Array:
    """Attention pooling of [N, D] to [D]."""
    norm = weights["summary.norm.weight"], weights["summary.norm.bias"]
    scores = [float(linear(weights, "summary.score", layer_norm(token, *norm, 1e-5))[0]) for token in tokens]
    return np.asarray(sum(share * token for share, token in zip(softmax(scores), tokens, strict=True)))


def picture_rows(weights: Weights, config: ModelConfig, tokens: Array, scores: Array, image: int) -> list[Row]:
    """Projected patches [P, D] to the rows of one image: retained, summary, skipped, summary."""
    skip = config.skip
    if skip is None:
        return [Row(token, RETAINED, image) for token in tokens]
    kept, rest = select(scores, skip.num_retained)
    rows = [Row(tokens[patch], RETAINED, image) for patch in kept]
    rows.append(Row(summarise(weights, tokens[kept]), SUMMARY, image))
    if skip.num_skipped and rest:
        merged = merge(tokens[rest], min(skip.num_skipped, len(rest)))
        rows += [Row(token, SKIPPED, image) for token in merged]
        rows.append(Row(summarise(weights, merged), SUMMARY, image))
    return rows


# --- the decoder ---------------------------------------------------------------------------------------------------


def prompt_rows(
    weights: Weights, config: ModelConfig, ids: Sequence[int], image_id: int, pictures: Sequence[tuple[Array, Array]]
) -> list[Row]:
    """Ids with a placeholder for each of `pictures` (projected patches, scores) to rows in attention order."""
    rows: list[Row] = []
    image = 0
    for token in ids:
        if token == image_id:
            rows += picture_rows(weights, config, *pictures[image], image)
            image += 1
        else:
            rows.append(Row(weights["decoder.embed.weight"][token], TEXT))
    return rows


def may_attend(rows: Sequence[Row], query: int, key: int, visibility: str, num_prompt: int, evict: bool) -> bool:
    """Causal; skipped rows are hidden from other images and text (`image`), or from what is generated (`evict`)."""
    if key > query:
        return False
    if rows[key].kind != SKIPPED:
        return True
    if evict and query >= num_prompt:
        return False
    return visibility == "all" or rows[query].image == rows[key].image


def forward(
    weights: Weights,
    config: TextConfig,
    rows: Sequence[Row],
    visibility: str,
    *,
    num_prompt: int | None = None,
    evict: bool = False,
) -> Trace:
    """All rows through all layers. Rows from `num_prompt` on are decoded ones: with `evict` they see no skipped row."""
    prompt = len(rows) if num_prompt is None else num_prompt
    visible = [
        [key for key in range(len(rows)) if may_attend(rows, query, key, visibility, prompt, evict)]
        for query in range(len(rows))
    ]
    is_skipped = [row.kind == SKIPPED for row in rows]
    h = [row.vector for row in rows if row.kind != SKIPPED]
    s = [row.vector for row in rows if row.kind == SKIPPED]
    trace = Trace(skipped=[list(s)])
    for layer in range(config.num_layers):
        name, eps = f"decoder.layers.{layer}", config.rms_norm_eps
        norm1, norm2 = weights[f"{name}.norm1.weight"], weights[f"{name}.norm2.weight"]
        joined = _interleave(
            [rms_norm(row, norm1, eps) for row in h], [rms_norm(row, norm1, eps) for row in s], is_skipped
        )
        mixed, keys = _attend(weights, f"{name}.attention", config, joined, visible)
        trace.keys.append(keys)
        of_h = [row for row, skipped in zip(mixed, is_skipped, strict=True) if not skipped]
        of_s = [row for row, skipped in zip(mixed, is_skipped, strict=True) if skipped]
        h = [row + more for row, more in zip(h, of_h, strict=True)]
        s = [row + more for row, more in zip(s, of_s, strict=True)]
        h = [row + swiglu(weights, f"{name}.ffn", rms_norm(row, norm2, eps)) for row in h]
        trace.skipped.append(list(s))
    places = [place for place, skipped in enumerate(is_skipped) if not skipped]
    for place, row in zip(places, h, strict=True):
        normed = rms_norm(row, weights["decoder.norm.weight"], config.rms_norm_eps)
        trace.logits[place] = linear(weights, "decoder.head", normed)
    return trace


def swiglu(weights: Weights, name: str, row: Array) -> Array:
    return linear(
        weights, f"{name}.down", silu(linear(weights, f"{name}.gate", row)) * linear(weights, f"{name}.up", row)
    )


def _interleave(h: list[Array], s: list[Array], is_skipped: Sequence[bool]) -> list[Array]:
    from_h, from_s = iter(h), iter(s)
    return [next(from_s) if skipped else next(from_h) for skipped in is_skipped]


def _attend(
    weights: Weights, name: str, config: TextConfig, rows: Sequence[Array], visible: Sequence[Sequence[int]]
) -> tuple[list[Array], list[Array]]:
    size, shared = config.head_dim, config.num_heads // config.num_kv_heads
    queries = [linear(weights, f"{name}.q", row).reshape(config.num_heads, size) for row in rows]
    keys = [linear(weights, f"{name}.k", row).reshape(config.num_kv_heads, size) for row in rows]
    values = [linear(weights, f"{name}.v", row).reshape(config.num_kv_heads, size) for row in rows]
    for place in range(len(rows)):
        queries[place] = np.array([rotate(head, place, config.rope_theta) for head in queries[place]])
        keys[place] = np.array([rotate(head, place, config.rope_theta) for head in keys[place]])
    out = []
    for query, seen in zip(queries, visible, strict=True):
        heads: list[Any] = []
        for head in range(config.num_heads):
            group = head // shared
            shares = softmax([float(query[head] @ keys[key][group]) / math.sqrt(size) for key in seen])
            heads.append(sum(share * values[key][group] for share, key in zip(shares, seen, strict=True)))
        out.append(linear(weights, f"{name}.o", np.concatenate(heads)))
    return out, keys


def continuation(
    weights: Weights, config: TextConfig, prompt: Sequence[Row], ids: Sequence[int], visibility: str, *, evict: bool
) -> Array:
    """[1 + n, vocab]: logits of the prompt's last row and of each of the n `ids` that are forced behind it."""
    rows = [*prompt, *(Row(weights["decoder.embed.weight"][token], TEXT) for token in ids)]
    trace = forward(weights, config, rows, visibility, num_prompt=len(prompt), evict=evict)
    return np.array([trace.logits[place] for place in range(len(prompt) - 1, len(rows))])


def generate(
    weights: Weights, config: TextConfig, prompt: Sequence[Row], count: int, visibility: str, *, evict: bool
) -> list[int]:
    """The greedy continuation."""
    ids: list[int] = []
    for _ in range(count):
        ids.append(int(continuation(weights, config, prompt, ids, visibility, evict=evict)[-1].argmax()))
    return ids


def plain_llama(weights: Weights, config: TextConfig, embeddings: Array) -> Array:
    """A Llama-type decoder that has never heard of skipping: [L, D] to logits [L, vocab]."""
    hidden, length, size = embeddings, len(embeddings), config.head_dim
    causal = np.where(np.tri(length, dtype=bool), 0.0, -np.inf)
    shared = config.num_heads // config.num_kv_heads
    frequency = config.rope_theta ** (-np.arange(0, size, 2) / size)
    turn = np.exp(1j * np.arange(length)[:, None] * frequency)

    def rope(x: Array) -> Array:
        z = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turn[:, None]
        return np.concatenate([z.real, z.imag], -1)

    def norm(x: Array, name: str) -> Array:
        return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weights[f"{name}.weight"])

    for layer in range(config.num_layers):
        w = {part: weights[f"decoder.layers.{layer}.{part}.weight"].T for part in _LLAMA_PARTS}
        x = norm(hidden, f"decoder.layers.{layer}.norm1")
        bias = {part: weights.get(f"decoder.layers.{layer}.attention.{part}.bias", 0.0) for part in "qkv"}
        query = rope((x @ w["attention.q"] + bias["q"]).reshape(length, -1, size))
        key = rope((x @ w["attention.k"] + bias["k"]).reshape(length, -1, size)).repeat(shared, 1)
        value = (x @ w["attention.v"] + bias["v"]).reshape(length, -1, size).repeat(shared, 1)
        scores = np.einsum("qhd,khd->hqk", query, key) / math.sqrt(size) + causal
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        hidden = hidden + np.einsum("hqk,khd->qhd", shares, value).reshape(length, -1) @ w["attention.o"]
        x = norm(hidden, f"decoder.layers.{layer}.norm2")
        hidden = hidden + (silu(x @ w["ffn.gate"]) * (x @ w["ffn.up"])) @ w["ffn.down"]
    return np.asarray(norm(hidden, "decoder.norm") @ weights["decoder.head.weight"].T)


_LLAMA_PARTS = ("attention.q", "attention.k", "attention.v", "attention.o", "ffn.gate", "ffn.up", "ffn.down")
