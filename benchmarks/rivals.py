"""Other ways to spend fewer visual rows, on the weights of the same model: what `main_table` holds Skip-Vision against.

Before the decoder: random drop, average pooling, and a rule after VisionZip (arXiv 2412.04467). Inside of it: a rule
after FastV (arXiv 2403.06764). Also what ablations of Skip-Vision itself need: no summary rows, and a cache in which
skipped rows stay.

Shapes: I images, T tokens of an image, D width, B sequences, L rows, G KV heads, C cache capacity, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from skipvision.config import ModelConfig, Visibility
from skipvision.decoder import Decoder, DecoderLayer, KVCache
from skipvision.layout import BatchLayout, ImageSpan
from skipvision.merge import merge_tokens
from skipvision.model import BatchTensors, SkipVisionModel, attention_mask
from skipvision.select import split_tokens, token_scores

Reduce = Callable[[Tensor, Tensor, torch.Generator | None], Tensor]
"""Tokens [I, T, D], and what CLS pays to each [I, T], to visual rows [I, V, D]."""


class Rival(SkipVisionModel):
    """A plain model whose visual rows are made by `reduce` and stand as `span` says."""

    def __init__(self, config: ModelConfig, span: ImageSpan, reduce: Reduce, visibility: Visibility = "image") -> None:
        super().__init__(config)
        self.span, self.reduce, self.visibility = span, reduce, visibility

    def split(self, tokens: Tensor, attention: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.reduce(tokens, attention, generator)


def random_drop(num_left: int) -> Reduce:
    """As many tokens, drawn anew for each picture, in raster order."""

    def reduce(tokens: Tensor, attention: Tensor, generator: torch.Generator | None) -> Tensor:
        left, _ = split_tokens(token_scores("random", attention, num_left, generator), num_left)
        return _taken(tokens, left)

    return reduce


def average_pool(side: int) -> Reduce:
    """The grid of tokens, averaged to a grid of `side` x `side`; where windows do not fit, they overlap."""

    def reduce(tokens: Tensor, _attention: Tensor, _generator: torch.Generator | None) -> Tensor:
        grid = math.isqrt(tokens.shape[1])
        maps = tokens.transpose(1, 2).reshape(len(tokens), -1, grid, grid)
        return F.adaptive_avg_pool2d(maps, side).flatten(2).transpose(1, 2)

    return reduce


def without_summary(num_retained: int, num_skipped: int) -> Reduce:
    """Skip-Vision's retained tokens, and what the rest is merged to, alone."""

    def reduce(tokens: Tensor, attention: Tensor, _generator: torch.Generator | None) -> Tensor:
        retained, rest = split_tokens(attention, num_retained)
        return torch.cat([_taken(tokens, retained), merge_tokens(_taken(tokens, rest), num_skipped)], 1)

    return reduce


def visionzip(num_dominant: int, num_contextual: int) -> Reduce:
    """The tokens that CLS looks at most, and of the others an even stride, each the mean of itself and of those that
    are nearest to it by cosine.

    VisionZip does it in front of the projector, by the encoder's keys. Here it is done behind, by the tokens, since the
    projector's convolutions need the whole grid.
    """

    def reduce(tokens: Tensor, attention: Tensor, _generator: torch.Generator | None) -> Tensor:
        dominant, rest = split_tokens(attention, num_dominant)
        others = _taken(tokens, rest)
        count = others.shape[1]
        target = torch.arange(num_contextual) * (count // num_contextual)
        # In fp32 under autocast too, as `merge_tokens` does it.
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            unit = F.normalize(others.detach().float(), dim=-1)
            nearest = (unit @ unit[:, target].transpose(1, 2)).argmax(-1)
            nearest[:, target] = torch.arange(num_contextual)
            members = F.one_hot(nearest, num_contextual).transpose(1, 2).float()
            shares = members / members.sum(2, keepdim=True)
        return torch.cat([_taken(tokens, dominant), shares.to(others.dtype) @ others], 1)

    return reduce


def _taken(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


@dataclass
class SeenCache(KVCache):
    """A cache that says of each layer which of its rows are looked at."""

    seen: list[Tensor] = field(default_factory=list)
    """Per layer [B, C]."""

    @staticmethod
    def of(cache: KVCache) -> SeenCache:
        """All of an empty cache."""
        batch, _, capacity, _ = cache.keys[0].shape
        seen = [torch.ones(batch, capacity, dtype=torch.bool) for _ in cache.keys]
        return SeenCache(cache.keys, cache.values, cache.lengths, cache.next_positions, seen)


@torch.no_grad()
def extend(decoder: Decoder, hidden: Tensor, cache: SeenCache) -> Tensor:
    """`Decoder.extend` in which each layer looks at what its cache says."""
    new = torch.arange(hidden.shape[1])
    rope = decoder.rope(cache.next_positions[:, None] + new)
    written = torch.arange(cache.capacity) <= (cache.lengths[:, None] + new)[..., None]
    for number, layer in enumerate(_layers(decoder)):
        query, key, value = layer.attention.project(layer.norm1(hidden), rope)
        keys, values = cache.write(number, key, value)
        mask = (written & cache.seen[number][:, None])[:, None]
        hidden = layer.feed_forward(hidden + layer.attention.attend(query, keys, values, mask), hidden.shape[1])
    cache.lengths += hidden.shape[1]
    cache.next_positions += hidden.shape[1]
    return hidden


@torch.no_grad()
def prefill_whole(
    model: SkipVisionModel, input_ids: Tensor, visual: Tensor, batch: BatchLayout, capacity: int
) -> tuple[Tensor, SeenCache]:
    """`SkipVisionModel.prefill` without eviction: skipped rows stay in the cache, in front of the others.

    Every sequence must skip as many rows. They are seen by whatever comes; `hide_skipped` changes that.
    """
    rows = BatchTensors.of(batch, input_ids.device)
    num_skipped = rows.source.shape[1] - rows.num_kept
    cache = SeenCache.of(model.new_cache(len(input_ids), capacity + num_skipped))
    hidden, rope = model.embed(input_ids, visual, rows.source), model.decoder.rope(rows.positions)
    mask = attention_mask(rows.positions, rows.visible_until)
    for number, layer in enumerate(_layers(model.decoder)):
        hidden, key, value = layer(hidden, rope, mask, rows.num_kept)
        cache.write(number, key.roll(num_skipped, 2), value.roll(num_skipped, 2))
    cache.lengths = rows.kept_lengths + num_skipped
    cache.next_positions = rows.next_positions.clone()
    return model.decoder.logits(hidden[torch.arange(len(hidden)), rows.kept_lengths - 1]), cache


def hide_skipped(cache: SeenCache, num_skipped: int) -> None:
    """Nothing looks at the skipped rows of `prefill_whole` any more."""
    for seen in cache.seen:
        seen[:, :num_skipped] = False


@torch.no_grad()
def prefill_fastv(
    model: SkipVisionModel,
    input_ids: Tensor,
    visual: Tensor,
    batch: BatchLayout,
    capacity: int,
    *,
    num_left: int,
    after: int = 2,
) -> tuple[Tensor, SeenCache]:
    """`SkipVisionModel.prefill` of a plain model, in which behind layer `after` only `num_left` visual rows go on.

    Those are the ones that the last row of the prompt looks at most in layer `after`, as a mean over heads; the others
    leave the later layers, and their caches. Position ids stay. Every prompt begins with its one picture.
    """
    rows = BatchTensors.of(batch, input_ids.device)
    picture, last = visual.shape[1], rows.kept_lengths - 1
    sequences = torch.arange(len(input_ids))[:, None]
    cache = SeenCache.of(model.new_cache(len(input_ids), capacity))
    hidden, rope = model.embed(input_ids, visual, rows.source), model.decoder.rope(rows.positions)
    mask = attention_mask(rows.positions, rows.visible_until)
    index = torch.arange(hidden.shape[1]).expand(len(hidden), -1)
    for number, layer in enumerate(_layers(model.decoder)):
        before = hidden[sequences, last[:, None]]
        hidden, key, value = layer(hidden, rope, mask, hidden.shape[1])
        cache.keys[number][sequences, :, index] = key.transpose(1, 2)
        cache.values[number][sequences, :, index] = value.transpose(1, 2)
        if number >= after:
            cache.seen[number][:, :picture] = False
            cache.seen[number][sequences, index] = True
        if number == after - 1:
            at_last = (rope[0][sequences, last[:, None]], rope[1][sequences, last[:, None]])
            query, _, _ = layer.attention.project(layer.norm1(before), at_last)
            paid = _paid(query, key, mask[sequences, 0, last[:, None]][:, None])
            left = paid[:, :picture].topk(num_left).indices.sort().values
            index = torch.cat([left, index[:, picture:]], 1)
            hidden, last = hidden[sequences, index], last - (picture - num_left)
            rope = (rope[0][sequences, index], rope[1][sequences, index])
            mask = mask[sequences[..., None], 0, index[:, :, None], index[:, None]][:, None]
    cache.lengths, cache.next_positions = rows.kept_lengths.clone(), rows.next_positions.clone()
    return model.decoder.logits(hidden[torch.arange(len(hidden)), last]), cache


def _paid(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """[B, L]: what one query row [B, H, 1, d] pays to each key [B, G, L, d], as a mean over heads."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    paid: Tensor = scores.masked_fill(~mask, -math.inf).softmax(-1)[:, :, 0].mean(1)
    return paid


def _layers(decoder: Decoder) -> list[DecoderLayer]:
    return [cast("DecoderLayer", layer) for layer in decoder.layers]
