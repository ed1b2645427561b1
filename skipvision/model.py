"""Skip-Vision end to end: pictures and token ids in, logits and a reduced KV cache out.

Shapes: B sequences, T ids (one placeholder per run of visual rows), I images, P patches and then tokens of an image,
V visual rows, L rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipvision.config import RANKED, ModelConfig, SkipConfig
from skipvision.decoder import Decoder, KVCache
from skipvision.layout import BatchLayout, ImageSpan
from skipvision.merge import merge_tokens
from skipvision.projector import Projector, pixel_shuffle
from skipvision.resampler import Resampler
from skipvision.select import split_tokens, token_scores
from skipvision.summary import SummaryPool
from skipvision.tiles import Cut, mosaic
from skipvision.vision import VisionEncoder, VisionOutput


def attention_mask(position_ids: Tensor, visible_until: Tensor) -> Tensor:
    """[B, 1, L, L] bool from two [B, L] vectors of the layout: which row (first L) may look at which (second L)."""
    query, key = position_ids[:, :, None], position_ids[:, None]
    return ((key <= query) & (query <= visible_until[:, None]))[:, None]


@dataclass(frozen=True)
class BatchTensors:
    """A `BatchLayout` on the device of a model; [B, L] and [B]."""

    source: Tensor
    positions: Tensor
    visible_until: Tensor
    kept_lengths: Tensor
    next_positions: Tensor
    num_kept: int

    @staticmethod
    def of(batch: BatchLayout, device: torch.device) -> BatchTensors:
        arrays = batch.source, batch.positions, batch.visible_until, batch.kept_lengths, batch.next_positions
        source, positions, until, kept, following = (torch.from_numpy(array).to(device) for array in arrays)
        return BatchTensors(source, positions, until, kept, following, batch.num_kept)


class SkipVisionModel(nn.Module):
    """ViT, projector, Skip-Vision split, Llama-type decoder. `config.skip = None` is the plain model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.span = ImageSpan.of(config)
        self.vision = VisionEncoder(config.vision)
        self.projector = Projector(config) if config.resampler is None else Resampler(config)
        joined = config.tiles is not None and config.tiles.is_joined
        self.newline = nn.Parameter(torch.zeros(config.text.hidden_size)) if joined else None
        self.summary = SummaryPool(config.text.hidden_size) if config.skip is not None else None
        self.decoder = Decoder(config.text)

    def with_skip(self, skip: SkipConfig | None) -> SkipVisionModel:
        """The model with another skip setting, on the same weights in memory; a plain one leaves the summary layer out.

        A plain model that is to skip gets a summary layer that takes the mean of its group, until it is trained.
        """
        with torch.device("meta"):
            other = SkipVisionModel(self.config.with_skip(skip))
        names = other.state_dict().keys()
        state = {name: each for name, each in self.state_dict().items() if name in names}
        if other.summary is not None and self.summary is None:
            weight = self.decoder.embed.weight
            fresh = SummaryPool(self.config.text.hidden_size, of_mean=True).to(weight.device, weight.dtype)
            state |= {f"summary.{name}": each for name, each in fresh.state_dict().items()}
        other.load_state_dict(state, assign=True)
        if self.config.text.tie_embeddings:
            other.decoder.head.weight = other.decoder.embed.weight
        return other.train(self.training)

    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[I, 3, H, W] to visual rows [I, V, D] in attention order: retained, summary, skipped, summary.

        `generator` is what the random selector draws from.
        """
        return self.visual_rows(*self._see(pixels), generator)

    def encode_picture(self, pixels: Tensor, cut: Cut, generator: torch.Generator | None = None) -> Tensor:
        """All views of one picture [I, 3, H, W] to visual rows: [1, V, D] where they are joined, else [I, V, D]."""
        return self.split(*self.picture_tokens(pixels, cut), generator)

    def picture_tokens(self, pixels: Tensor, cut: Cut | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [I, T, D] of pictures that are seen once or of the views of one, and what is paid to each [I, T].

        Where views are joined, which `cut` says, those of the picture: [1, T, D] and [1, T].
        """
        features, attention = self._see(pixels)
        tokens, paid = self.projector(features), self._token_attention(attention)
        if self.newline is None:
            return tokens, paid
        assert cut is not None
        return self._joined(tokens, paid, cut)

    def encode_pictures(self, pixels: Tensor, cuts: Sequence[Cut], generator: torch.Generator | None = None) -> Tensor:
        """All views of several pictures [I, 3, H, W] to the visual rows of all, one behind the other: [1, V, D].

        Encoder and projector see all views at once.
        """
        if self.newline is None:
            return self.encode_images(pixels, generator).flatten(0, 1)[None]
        features, attention = self._see(pixels)
        views = [cut.num_views for cut in cuts]
        tokens = torch.split(self.projector(features), views)
        paid = torch.split(self._token_attention(attention), views)
        joined = (self._joined(*each) for each in zip(tokens, paid, cuts, strict=True))
        return torch.cat([self.split(*each, generator) for each in joined], 1)

    def _joined(self, tokens: Tensor, attention: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
        """Tokens [I, T, D] of one picture's views, and what is paid to each [I, T], to those of the picture."""
        assert self.newline is not None
        pieces = mosaic(self.config, cut)
        index = torch.from_numpy(pieces.index).to(tokens.device)
        weight = torch.from_numpy(pieces.weight).to(tokens)
        table = torch.cat([tokens.flatten(0, 1), self.newline[None]])
        rows = (table[index] * weight[..., None]).sum(0)
        # A newline is attended to by nothing.
        paid = torch.cat([attention.flatten(), attention.new_zeros(1)])
        scores = (paid[index] * weight.to(paid)).sum(0)
        return rows[None], scores[None]

    def _see(self, pixels: Tensor) -> VisionOutput:
        skip = self.config.skip
        ranked_by = skip.selector if skip is not None and skip.selector in RANKED else None
        return self.vision(pixels, ranked_by)  # type: ignore[no-any-return]

    def _token_attention(self, attention: Tensor) -> Tensor:
        """[I, P] of patches to that of tokens: the sum of their patches'; a resampler's are paid nothing."""
        if self.config.resampler is not None:
            return attention.new_zeros(len(attention), self.config.num_tokens)
        side = self.config.pixel_shuffle
        return attention if side == 1 else pixel_shuffle(attention[..., None], side).sum(-1)

    def visual_rows(self, features: Tensor, attention: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[I, P, F] and [I, P], as the encoder gives them, to [I, V, D] (Skip-Vision, section 4)."""
        return self.split(self.projector(features), self._token_attention(attention), generator)

    def split(self, tokens: Tensor, attention: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens [I, T, D], and what is paid to each [I, T], to [I, V, D]: select, merge the rest, summarise both.

        `generator` is what the random selector draws from.
        """
        return self.arrange(tokens, self.select(attention, generator))

    def select(self, attention: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor] | None:
        """Indices of the retained [I, R] and of the other tokens, both in raster order; None in the plain model."""
        skip = self.config.skip
        if skip is None:
            return None
        return split_tokens(token_scores(skip.selector, attention, skip.num_retained, generator), skip.num_retained)

    def arrange(self, tokens: Tensor, chosen: tuple[Tensor, Tensor] | None) -> Tensor:
        """Tokens [I, T, D] to [I, V, D], of which `chosen` are retained: merge the rest, summarise both."""
        skip = self.config.skip
        if skip is None or self.summary is None or chosen is None:
            return tokens
        retained_index, rest_index = chosen
        width = tokens.shape[-1]
        retained = tokens.gather(1, retained_index[..., None].expand(-1, -1, width))
        summary = self.summary(retained[:, skip.num_unpooled :])
        if skip.num_skipped == 0:
            return torch.cat([retained, summary], 1)
        rest = tokens.gather(1, rest_index[..., None].expand(-1, -1, width))
        skipped = merge_tokens(rest, min(skip.num_skipped, rest.shape[1]))
        return torch.cat([retained, summary, skipped, self.summary(skipped)], 1)

    def embed(self, input_ids: Tensor, visual: Tensor, source: Tensor) -> Tensor:
        """[B, L, D] in memory order, taken by `source` [B, L] from text embeddings [B*T] and `visual` [I, V, D]."""
        text = self.decoder.embed(input_ids).flatten(0, 1)
        return torch.cat([text, visual.flatten(0, 1).to(text.dtype)])[source]

    def forward(self, input_ids: Tensor, visual: Tensor, batch: BatchLayout, cache: KVCache | None = None) -> Tensor:
        """Logits [B, num_kept, vocab] of the kept rows; `input_ids` [B, T]. Fills an empty `cache` if given."""
        return self.decoder.logits(self._kept_rows(input_ids, visual, BatchTensors.of(batch, input_ids.device), cache))

    def _kept_rows(
        self, input_ids: Tensor, visual: Tensor, batch: BatchTensors, cache: KVCache | None, num_cached: int = 0
    ) -> Tensor:
        """[B, num_kept, D] behind the last layer."""
        hidden = self.embed(input_ids, visual, batch.source)
        positions, mask = batch.positions, attention_mask(batch.positions, batch.visible_until)
        if cache is not None and num_cached:
            positions = positions + cache.next_positions[:, None]
            in_use = torch.arange(num_cached, device=mask.device) < cache.lengths[:, None]
            mask = torch.cat([in_use[:, None, None].expand(-1, -1, mask.shape[2], -1), mask], 3)
        return self.decoder(hidden, positions, mask, batch.num_kept, cache, num_cached)  # type: ignore[no-any-return]

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for `capacity` kept rows, in the dtype and on the device of the weights."""
        text, weight = self.config.text, self.decoder.embed.weight
        shape = (batch_size, text.num_kv_heads, capacity, text.head_dim)
        keys, values = ([weight.new_zeros(shape) for _ in range(text.num_layers)] for _ in range(2))
        lengths, next_positions = (weight.new_zeros(batch_size, dtype=torch.long) for _ in range(2))
        return KVCache(keys, values, lengths, next_positions)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, visual: Tensor, batch: BatchLayout, capacity: int) -> tuple[Tensor, KVCache]:
        """Logits [B, vocab] of each sequence's last row, and the reduced cache (skipped rows evicted).

        Raises ValueError where the kept rows do not fit `capacity`.
        """
        if batch.num_kept > capacity:
            raise ValueError(f"{batch.num_kept} rows do not fit a KV cache of {capacity}")
        cache = self.new_cache(input_ids.shape[0], capacity)
        return self.fill(input_ids, visual, BatchTensors.of(batch, input_ids.device), cache), cache

    @torch.no_grad()
    def fill(self, input_ids: Tensor, visual: Tensor, batch: BatchTensors, cache: KVCache) -> Tensor:
        """Logits of `prefill` into a cache that there is, whatever was in it, with nothing but work for the device."""
        cache.lengths.zero_()
        cache.next_positions.zero_()
        return self.append(input_ids, visual, batch, cache, 0)

    @torch.no_grad()
    def append(self, input_ids: Tensor, visual: Tensor, batch: BatchTensors, cache: KVCache, num_cached: int) -> Tensor:
        """`fill` behind what is in the cache, at most `num_cached` rows a sequence, which the new rows attend to.

        Logits [B, vocab], as if all had been there at once, unless later rows may attend to skipped ones: those of what
        was filled before are gone.
        """
        hidden = self._kept_rows(input_ids, visual, batch, cache, num_cached)
        cache.lengths += batch.kept_lengths
        cache.next_positions += batch.next_positions
        last = hidden[torch.arange(len(hidden), device=hidden.device), batch.kept_lengths - 1]
        return self.decoder.logits(last)

    @torch.no_grad()
    def decode(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Logits [B, n, vocab] of n new ids [B, n] behind the cache, which grows by n.

        Raises ValueError where it has no room for them.
        """
        if int(cache.lengths.max()) + input_ids.shape[1] > cache.capacity:
            raise ValueError(f"the KV cache of {cache.capacity} rows is full")
        return self.decoder.logits(self.decoder.extend(self.decoder.embed(input_ids), cache))

    @torch.no_grad()
    def generate(
        self, input_ids: Sequence[Sequence[int]], visual: Tensor, batch: BatchLayout, max_new_tokens: int, stop_id: int
    ) -> list[list[int]]:
        """Greedy continuation of each sequence of ids, up to `stop_id` (left out) or `max_new_tokens`; `visual` as for
        `prefill`."""
        width = max(map(len, input_ids))
        padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in input_ids], device=visual.device)
        logits, cache = self.prefill(padded, visual, batch, batch.num_kept + max_new_tokens)
        answers: list[list[int]] = [[] for _ in input_ids]
        running = [True] * len(answers)
        for step in range(max_new_tokens):
            token = logits.argmax(-1)
            for row, value in enumerate(token.tolist()):
                running[row] = running[row] and value != stop_id
                if running[row]:
                    answers[row].append(value)
            if not any(running) or step == max_new_tokens - 1:
                break
            logits = self.decode(token[:, None], cache)[:, -1]
        return answers
