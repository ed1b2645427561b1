"""Patch features to the decoder's width: LLaVA's two-layer MLP, plus where the patch stood."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvision.config import ModelConfig


class Projector(nn.Module):
    """[I, P, F] to [I, P, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, grid = config.text.hidden_size, config.vision.grid
        self.fc1 = nn.Linear(config.vision.feature_size, config.projector_size)
        self.fc2 = nn.Linear(config.projector_size, width)
        self.norm = nn.LayerNorm(width) if config.projector_norm else None
        self.rows = nn.Parameter(torch.zeros(grid, width)) if config.projector_position else None
        self.columns = nn.Parameter(torch.zeros(grid, width)) if config.projector_position else None

    def forward(self, features: Tensor) -> Tensor:
        hidden: Tensor = self.fc2(F.gelu(self.fc1(features)))
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.rows is not None and self.columns is not None:
            hidden = hidden + (self.rows[:, None] + self.columns[None]).flatten(0, 1)
        return hidden
