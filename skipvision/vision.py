"""The vision encoder: a pre-norm ViT (Dosovitskiy et al. 2021) that also says how CLS attends to each patch.

Shapes: I images, P patches, D width, F = D * len(feature_layers).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvision.config import VisionConfig


class VisionOutput(NamedTuple):
    """What the encoder knows of each patch, in raster order."""

    features: Tensor
    """[I, P, F], the chosen hidden states side by side, each normalised over its own D channels where that is asked."""
    cls_attention: Tensor
    """[I, P], attention of CLS to each patch in the select layer, summed over heads."""


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
        """Query, key and value of the normed input, each [I, H, 1+P, D/H]."""
        images, rows, width = hidden.shape
        qkv = self.qkv(self.norm1(hidden)).view(images, rows, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`hidden` [I, 1+P, D] with what `heads` made of it."""
        mixed = F.scaled_dot_product_attention(query, key, value)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        grown = self.fc1(self.norm2(hidden))
        grown = F.gelu(grown) if self.activation == "gelu" else grown * torch.sigmoid(1.702 * grown)
        output: Tensor = hidden + self.fc2(grown)
        return output


def _cls_attention(query: Tensor, key: Tensor) -> Tensor:
    """[I, P]: the CLS row of a block's attention, summed over heads. Only that row is computed."""
    scores = (query[:, :, :1] @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    attention: Tensor = scores.softmax(-1)[:, :, 0, 1:].sum(1)
    return attention


class VisionEncoder(nn.Module):
    """Pixels to patch features and CLS attention."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.position = nn.Parameter(torch.zeros(1 + config.num_patches, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.embedding_norm else None
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))

    def forward(self, pixels: Tensor) -> VisionOutput:
        """`pixels`: [I, 3, H, W], normalised by image_mean and image_std."""
        config = self.config
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        cls_row = self.cls_token.expand(patches.shape[0], 1, -1)
        hidden = torch.cat([cls_row, patches], 1) + self.position
        if self.norm is not None:
            hidden = self.norm(hidden)
        features = {0: hidden}
        cls_attention = hidden.new_zeros(0)
        blocks = islice(cast("Iterable[VisionBlock]", self.blocks), config.num_layers_run)
        for number, block in enumerate(blocks, start=1):
            query, key, value = block.heads(hidden)
            if number == config.select_layer:
                cls_attention = _cls_attention(query, key)
            hidden = block(hidden, query, key, value)
            features[number] = hidden
        chosen = [features[layer][:, 1:] for layer in config.feature_layers]
        if config.feature_norm:
            chosen = [F.layer_norm(each, (config.hidden_size,)) for each in chosen]
        return VisionOutput(torch.cat(chosen, -1), cls_attention)
