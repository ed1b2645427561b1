"""A Llama-type decoder in which skipped rows bypass the FFN of every layer (Skip-FFN; Skip-Vision, section 4).

Shapes: B sequences, N rows now, K rows attended to, D width, H heads, G KV heads, d head size, C cache capacity.
Rows are in memory order (`layout.py`): the FFN stream is `hidden[:, :num_kept]`, a plain slice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvision.config import TextConfig


@dataclass
class KVCache:
    """K and V of the rows that decoding may attend to, in buffers of fixed capacity."""

    keys: list[Tensor]
    """Per layer [B, G, C, d]."""
    values: list[Tensor]
    lengths: Tensor
    """[B] rows in use."""
    next_positions: Tensor
    """[B] position id of the next token; larger than `lengths`, since evicted rows keep their positions."""

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Puts [B, G, n, d] behind each row's `lengths`; returns the whole buffers."""
        sequences, heads, new = (torch.arange(size, device=key.device) for size in key.shape[:3])
        # Not scatter_, which torch.compile turns into a copy of the whole cache.
        index = sequences[:, None, None], heads[:, None], (self.lengths[:, None] + new)[:, None]
        self.keys[layer][index] = key
        self.values[layer][index] = value
        return self.keys[layer], self.values[layer]


def rope_table(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, [B, N, d/2] in fp32, of the rotary angles at `position_ids` [B, N]."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[..., None].float() * theta**-exponent
    return angles.cos(), angles.sin()


def apply_rope(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [B, H, N, d]; the two halves of d are the pairs (Llama's layout)."""
    first, second = heads.chunk(2, -1)
    cos, sin = cos[:, None].to(heads.dtype), sin[:, None].to(heads.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Attention(nn.Module):
    """Grouped-query attention with RoPE."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def project(self, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, H, N, d], key and value [B, G, N, d], rotated."""
        batch, rows, _ = hidden.shape
        query = self.q(hidden).view(batch, rows, self.num_heads, self.head_dim).transpose(1, 2)
        key = self.k(hidden).view(batch, rows, self.num_kv_heads, self.head_dim).transpose(1, 2)
        value = self.v(hidden).view(batch, rows, self.num_kv_heads, self.head_dim).transpose(1, 2)
        return apply_rope(query, *rope), apply_rope(key, *rope), value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[B, N, D] from K attended rows; `mask` [B, 1, N, K], True where a row may look. None: K = N, and a row looks
        at itself and at those before it."""
        grouped = self.num_heads != self.num_kv_heads
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
        return self.o(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """All rows attend; only kept rows pass the second norm and the FFN (Skip-FFN)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = FeedForward(config)

    def forward(
        self,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        num_kept: int,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [B, N, D] behind the layer, and the key and value [B, G, N, d] that it made of all rows.

        They also attend to the key and value `past`, which `mask` has in front.
        """
        query, key, value = self.attention.project(self.norm1(hidden), rope)
        keys, values = (key, value) if past is None else (torch.cat([past[0], key], 2), torch.cat([past[1], value], 2))
        hidden = hidden + self.attention.attend(query, keys, values, mask)
        return self.feed_forward(hidden, num_kept), key, value

    def feed_forward(self, hidden: Tensor, num_kept: int) -> Tensor:
        """Residual FFN on the first `num_kept` rows; the others pass unchanged."""
        if num_kept == hidden.shape[1]:
            return hidden + self.ffn(self.norm2(hidden))  # type: ignore[no-any-return]
        kept, skipped = hidden[:, :num_kept], hidden[:, num_kept:]
        return torch.cat([kept + self.ffn(self.norm2(kept)), skipped], 1)


class Decoder(nn.Module):
    """Token embedding, layers, final norm and the (tied) output head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def rope(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return rope_table(position_ids, self.config.head_dim, self.config.rope_theta)

    def _layers(self) -> Iterable[DecoderLayer]:
        return cast("Iterable[DecoderLayer]", self.layers)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., vocab]."""
        return self.head(self.norm(hidden))  # type: ignore[no-any-return]

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        mask: Tensor | None,
        num_kept: int,
        cache: KVCache | None = None,
        num_cached: int = 0,
    ) -> Tensor:
        """Prefill: `hidden` [B, N, D] in memory order, `position_ids` [B, N], `mask` [B, 1, N, num_cached + N], or
        None where each row looks at all before it, as in a plain model: kernels then leave out half of the pairs.

        Returns the kept rows [B, num_kept, D] before the final norm. A `cache` receives their K and V only, behind what
        it holds: what is skipped is evicted by never being written. Its first `num_cached` rows are attended to.
        """
        rope = self.rope(position_ids)
        for number, layer in enumerate(self._layers()):
            past = None
            if cache is not None and num_cached:
                past = cache.keys[number][:, :, :num_cached], cache.values[number][:, :, :num_cached]
            hidden, key, value = layer(hidden, rope, mask, num_kept, past)
            if cache is not None:
                cache.write(number, key[:, :, :num_kept], value[:, :, :num_kept])
        return hidden[:, :num_kept]

    def extend(self, hidden: Tensor, cache: KVCache) -> Tensor:
        """Decode: n new rows [B, n, D] behind the cache. Returns them [B, n, D]; the cache grows by n, in place."""
        new = torch.arange(hidden.shape[1], device=hidden.device)
        rope = self.rope(cache.next_positions[:, None] + new)
        slots = torch.arange(cache.capacity, device=hidden.device)
        mask = (slots <= (cache.lengths[:, None] + new)[..., None])[:, None]
        for number, layer in enumerate(self._layers()):
            query, key, value = layer.attention.project(layer.norm1(hidden), rope)
            keys, values = cache.write(number, key, value)
            hidden = hidden + layer.attention.attend(query, keys, values, mask)
            hidden = layer.feed_forward(hidden, hidden.shape[1])
        cache.lengths += hidden.shape[1]
        cache.next_positions += hidden.shape[1]
        return hidden
