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


def encode(weights: Weights, config: VisionConfig, pixels: Array) -> tuple[Array, Array]:
    """One picture [3, H, W] to patch features [P, F] and CLS attention [P]."""
    side, width = config.patch_size, config.hidden_size
    kernel = weights["vision.patch_embed.weight"].reshape(width, -1)
    hidden = [weights["vision.cls_token"]]
    for y in range(config.grid):
        for x in range(config.grid):
            patch = pixels[:, y * side : (y + 1) * side, x * side : (x + 1) * side]
            hidden.append(kernel @ patch.reshape(-1) + weights["vision.patch_embed.bias"])
    hidden = [row + place for row, place in zip(hidden, weights["vision.position"], strict=True)]
    states, cls_attention = [hidden], np.zeros(config.num_patches)
    for layer in range(config.num_layers):
        name, eps = f"vision.blocks.{layer}", config.layer_norm_eps
        normed = [
            layer_norm(row, weights[f"{name}.norm1.weight"], weights[f"{name}.norm1.bias"], eps) for row in hidden
        ]
        qkv = [linear(weights, f"{name}.qkv", row).reshape(3, config.num_heads, -1) for row in normed]
        mixed = np.zeros((len(hidden), config.num_heads, width // config.num_heads))
        for head in range(config.num_heads):
            for row in range(len(hidden)):
                scores = [float(qkv[row][0, head] @ other[1, head]) / math.sqrt(mixed.shape[2]) for other in qkv]
                shares = softmax(scores)
                mixed[row, head] = sum(share * other[2, head] for share, other in zip(shares, qkv, strict=True))
                if row == 0 and layer + 1 == config.select_layer:
                    cls_attention += shares[1:]
        hidden = [row + linear(weights, f"{name}.out", mix.reshape(-1)) for row, mix in zip(hidden, mixed, strict=True)]
        normed = [
            layer_norm(row, weights[f"{name}.norm2.weight"], weights[f"{name}.norm2.bias"], eps) for row in hidden
        ]
        grown = [gelu(linear(weights, f"{name}.fc1", row)) for row in normed]
        hidden = [row + linear(weights, f"{name}.fc2", more) for row, more in zip(hidden, grown, strict=True)]
        states.append(hidden)
    features = [
        np.concatenate([layer_norm(states[layer][1 + patch], 1.0, 0.0, 1e-5) for layer in config.feature_layers])
        for patch in range(config.num_patches)
    ]
    return np.array(features), cls_attention


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
    """[P, F] to [P, D]."""
    out = []
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


# --- the three choices of Skip-Vision ------------------------------------------------------------------------------


def select(scores: Sequence[float] | Array, num_retained: int) -> tuple[list[int], list[int]]:
    """The best-scored patches and the others, both in raster order."""
    ranked = sorted(range(len(scores)), key=lambda patch: -scores[patch])
    return sorted(ranked[:num_retained]), sorted(ranked[num_retained:])


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
    if skip.num_skipped:
        merged = merge(tokens[rest], skip.num_skipped)
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
        query = rope((x @ w["attention.q"]).reshape(length, -1, size))
        key = rope((x @ w["attention.k"]).reshape(length, -1, size)).repeat(shared, 1)
        value = (x @ w["attention.v"]).reshape(length, -1, size).repeat(shared, 1)
        scores = np.einsum("qhd,khd->hqk", query, key) / math.sqrt(size) + causal
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        hidden = hidden + np.einsum("hqk,khd->qhd", shares, value).reshape(length, -1) @ w["attention.o"]
        x = norm(hidden, f"decoder.layers.{layer}.norm2")
        hidden = hidden + (silu(x @ w["ffn.gate"]) * (x @ w["ffn.up"])) @ w["ffn.down"]
    return np.asarray(norm(hidden, "decoder.norm") @ weights["decoder.head.weight"].T)


_LLAMA_PARTS = ("attention.q", "attention.k", "attention.v", "attention.o", "ffn.gate", "ffn.up", "ffn.down")
