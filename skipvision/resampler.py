"""Chain-of-Sight's multi-scale resampler: learned queries look at windows of patches, coarse to fine.

Of each scale, and for each layer of the encoder that is read, in order,

    q += CrossAttention(LN q, LN window)
    q += MLP(LN q)

with weights of their own; a LayerNorm and one matrix then take all scales, one behind the other, to the decoder's
width. A query belongs to one window and looks at nothing else.

Shapes: I images, P patches, D width of the encoder, W windows of a scale, K patches of a window, Q its queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvision.config import ConfigError, ModelConfig, ResamplerConfig, require
from skipvision.projector import pixel_shuffle

_QUERY_STD = 0.02


class WindowAttention(nn.Module):
    """One layer of the encoder, read by the queries of one scale."""

    def __init__(self, width: int, window: int, config: ResamplerConfig) -> None:
        super().__init__()
        self.num_heads, self.window = config.num_heads, window
        self.norm_query = nn.LayerNorm(width)
        self.norm_patches = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.mlp_ratio * width)
        self.fc2 = nn.Linear(config.mlp_ratio * width, width)

    def _heads(self, rows: Tensor) -> Tensor:
        """[I*W, N, D] to [I*W, H, N, D/H]."""
        return rows.view(*rows.shape[:2], self.num_heads, -1).transpose(1, 2)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        """`queries` [I*W, Q, D] after a look at `patches` [I, P, D], each at those of its own window."""
        both = self.kv(self.norm_patches(patches))
        windows = pixel_shuffle(both, self.window).reshape(len(queries), self.window**2, both.shape[-1])
        key, value = windows.chunk(2, -1)
        query = self.q(self.norm_query(queries))
        mixed = F.scaled_dot_product_attention(self._heads(query), self._heads(key), self._heads(value))
        queries = queries + self.out(mixed.transpose(1, 2).flatten(2))
        grown: Tensor = self.fc2(F.gelu(self.fc1(self.norm_mlp(queries))))
        return queries + grown


class Resampler(nn.Module):
    """[I, P, F] to tokens [I, T, D of the decoder]; T follows from the windows, not from the patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.resampler is not None
        self.config, self.grid = config.resampler, config.vision.grid
        width = config.vision.hidden_size
        self.queries = nn.ParameterList(
            nn.Parameter(nn.init.trunc_normal_(torch.empty(count, width), std=_QUERY_STD))
            for count in self.config.token_counts(self.grid)
        )
        """Of each scale [W*Q, D]: every window has queries of its own."""
        self.levels = nn.ModuleList(
            nn.ModuleList(WindowAttention(width, window, self.config) for window in self.config.windows)
            for _ in config.vision.feature_layers
        )
        """One of each scale for each layer of the encoder that is read."""
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, config.text.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """`features`: those layers of the encoder side by side."""
        images = len(features)
        by_level = features.chunk(len(self.levels), -1)
        scales = []
        for scale, count in enumerate(self.config.num_windows(self.grid)):
            learned = self.queries[scale]
            queries = learned.view(count, -1, learned.shape[-1]).repeat(images, 1, 1)
            for level, patches in zip(self.levels, by_level, strict=True):
                queries = cast("nn.ModuleList", level)[scale](queries, patches)
            scales.append(queries.reshape(images, -1, learned.shape[-1]))
        return self.output(self.norm(torch.cat(scales, 1)))  # type: ignore[no-any-return]


def expand_resampler(source: Resampler, config: ModelConfig, scale_map: Sequence[int] = (0, 1, 1)) -> Resampler:
    """A resampler of `config`, each of whose scales begins with the weights of a scale of `source`.

    Chain-of-Sight trains with 16 + 64 queries at 224 pixels and goes on with 16 + 256 + 1,024 at 448; `scale_map` names
    the source of each new scale. Attention and MLPs are copied. A scale with more windows repeats its queries over the
    grid of windows: those of one go to all that stand where it stood. Raises ConfigError for what does not fit.
    """
    require(config.resampler is not None, "a resampler can be expanded to a resampler alone")
    with torch.device("meta"):
        target = Resampler(config)
    old, new = source.config, target.config
    known = len(scale_map) == len(new.windows) and all(0 <= scale < len(old.windows) for scale in scale_map)
    require(known, f"scale_map must name one of {len(old.windows)} scales for each of {len(new.windows)}")
    require(old.num_heads == new.num_heads, f"resampler.num_heads: {old.num_heads} cannot become {new.num_heads}")
    weights = source.state_dict()
    taken = {name: each.clone() for name, each in weights.items() if name.startswith(("norm.", "output."))}
    for scale, origin in enumerate(scale_map):
        before, after = source.grid // old.windows[origin], target.grid // new.windows[scale]
        fits = after % before == 0 and old.queries[origin] == new.queries[scale]
        sizes = f"{before} windows a side of {old.queries[origin]}", f"{after} of {new.queries[scale]} queries"
        require(fits, f"resampler: scale {scale} cannot repeat its source: {sizes[0]} cannot become {sizes[1]}")
        grid = weights[f"queries.{origin}"].view(before, before, new.queries[scale], -1)
        repeated = grid.repeat_interleave(after // before, 0).repeat_interleave(after // before, 1)
        taken[f"queries.{scale}"] = repeated.flatten(0, 2)
        for level in range(len(source.levels)):
            start = f"levels.{level}.{origin}."
            layer = {name.removeprefix(start): each for name, each in weights.items() if name.startswith(start)}
            taken |= {f"levels.{level}.{scale}.{name}": each.clone() for name, each in layer.items()}
    try:
        target.load_state_dict(taken, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"resampler: weights of another size: {str(error).splitlines()[1].strip()}") from None
    return target.train(source.training)
