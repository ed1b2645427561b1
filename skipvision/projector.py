"""Patch features to the decoder's width: LLaVA's two-layer MLP, with convolutions inside, plus where a patch stood; or
one matrix over squares of patches, as SmolVLM has it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvision.config import ModelConfig


def pixel_shuffle(patches: Tensor, side: int) -> Tensor:
    """[I, P, C] in raster order to [I, P / side^2, C * side^2]: each square's patches side by side, in raster order."""
    images, count, channels = patches.shape
    lines = math.isqrt(count) // side
    squares = patches.view(images, lines, side, lines, side, channels).transpose(2, 3)
    return squares.reshape(images, lines**2, channels * side**2)


class Projector(nn.Module):
    """[I, P, F] to tokens [I, T, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, grid = config.text.hidden_size, config.vision.grid
        self.grid, self.side = grid, config.pixel_shuffle
        self.matrix = nn.Linear(config.projector_input, width, bias=False) if config.projector == "linear" else None
        if self.matrix is not None:
            return
        self.fc1 = nn.Linear(config.projector_input, config.projector_size)
        self.convs = nn.ModuleList(
            nn.Conv2d(config.projector_size, config.projector_size, 3, padding=1) for _ in range(config.projector_convs)
        )
        self.fc2 = nn.Linear(config.projector_size, width)
        self.norm = nn.LayerNorm(width) if config.projector_norm else None
        self.rows = nn.Parameter(torch.zeros(grid, width)) if config.projector_position else None
        self.columns = nn.Parameter(torch.zeros(grid, width)) if config.projector_position else None

    def forward(self, features: Tensor) -> Tensor:
        if self.side > 1:
            features = pixel_shuffle(features, self.side)
        if self.matrix is not None:
            return self.matrix(features)  # type: ignore[no-any-return]
        hidden: Tensor = F.gelu(self.fc1(features))
        if self.convs:
            grid = hidden.transpose(1, 2).reshape(-1, hidden.shape[-1], self.grid, self.grid)
            for conv in self.convs:
                grid = grid + F.gelu(conv(grid))
            hidden = grid.flatten(2).transpose(1, 2)
        hidden = self.fc2(hidden)
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.rows is not None and self.columns is not None:
            hidden = hidden + (self.rows[:, None] + self.columns[None]).flatten(0, 1)
        return hidden
