"""The vision encoder: a pre-norm ViT (Dosovitskiy et al. 2021) that also says how patches are attended to.

Shapes: I images, P patches, N rows (P, and CLS where there is one), D width, F = D * len(feature_layers).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvision.config import Activation, Selector, VisionConfig


class VisionOutput(NamedTuple):
    """What the encoder knows of each patch, in raster order."""

    features: Tensor
    """[I, P, F], the chosen hidden states side by side, each normalised over its own D channels where that is asked."""
    attention: Tensor
    """[I, P], attention to each patch in the select layer as the selector reads it; zeros where it reads none."""


class VisionBlock(nn.Module):
    """LayerNorm, self-attention, residual; LayerNorm, MLP, residual."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.activation = config.activation
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def heads(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the normed input, each [I, H, N, D/H]."""
        images, rows, width = hidden.shape
        qkv = self.qkv(self.norm1(hidden)).view(images, rows, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`hidden` [I, N, D] with what `heads` made of it."""
        mixed = F.scaled_dot_product_attention(query, key, value)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        grown = self.fc1(self.norm2(hidden))
        output: Tensor = hidden + self.fc2(_activated(grown, self.activation))
        return output


def _activated(hidden: Tensor, activation: Activation) -> Tensor:
    if activation == "quick_gelu":
        return hidden * torch.sigmoid(1.702 * hidden)
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


def _cls_attention(query: Tensor, key: Tensor) -> Tensor:
    """[I, N-1]: the CLS row of a block's attention, summed over heads. Only that row is computed."""
    scores = (query[:, :, :1] @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    attention: Tensor = scores.softmax(-1)[:, :, 0, 1:].sum(1)
    return attention


def _received_attention(query: Tensor, key: Tensor) -> Tensor:
    """[I, N]: what each row is attended to by all rows, as a mean over them, summed over heads; head by head."""
    received = query.new_zeros(query.shape[0], query.shape[2], dtype=torch.float32)
    for head in range(query.shape[1]):
        scores = (query[:, head] @ key[:, head].transpose(-1, -2)).float() * query.shape[-1] ** -0.5
        received += scores.softmax(-1).mean(1)
    return received


class VisionEncoder(nn.Module):
    """Pixels to patch features, and to how patches are attended to."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(config.hidden_size)) if config.has_cls else None
        self.position = nn.Parameter(torch.zeros(config.num_rows, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.embedding_norm else None
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))
        self.output_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.output_norm else None

    def forward(self, pixels: Tensor, ranked_by: Selector | None = "cls_attention") -> VisionOutput:
        """`pixels`: [I, 3, H, W], normalised by image_mean and image_std."""
        config = self.config
        hidden = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            hidden = torch.cat([self.cls_token.expand(hidden.shape[0], 1, -1), hidden], 1)
        hidden = hidden + self.position
        if self.norm is not None:
            hidden = self.norm(hidden)
        features = {0: hidden}
        first = int(config.has_cls)
        attention = hidden.new_zeros(hidden.shape[0], config.num_patches, dtype=torch.float32)
        blocks = islice(cast("Iterable[VisionBlock]", self.blocks), config.num_layers_run)
        for number, block in enumerate(blocks, start=1):
            query, key, value = block.heads(hidden)
            if number == config.select_layer and ranked_by == "received_attention":
                attention = _received_attention(query, key)[:, first:]
            elif number == config.select_layer and ranked_by == "cls_attention" and config.has_cls:
                attention = _cls_attention(query, key)
            hidden = block(hidden, query, key, value)
            features[number] = hidden
        if self.output_norm is not None:
            features[config.num_layers] = self.output_norm(hidden)
        chosen = [features[layer][:, first:] for layer in config.feature_layers]
        if config.feature_norm:
            chosen = [F.layer_norm(each, (config.hidden_size,)) for each in chosen]
        return VisionOutput(torch.cat(chosen, -1), attention)
