"""The adaptive summary layer: learned attention pooling of a group of tokens into one (Skip-Vision, section 4)."""

from __future__ import annotations

from torch import Tensor, nn


class SummaryPool(nn.Module):
    """One module, shared by the retained and the skipped group: LayerNorm(D), Linear(D, 1), softmax, weighted sum."""

    def __init__(self, width: int, *, of_mean: bool = False) -> None:
        """`of_mean`: with zero score weights, so that a group's mean is taken."""
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)
        if of_mean:
            nn.init.zeros_(self.score.weight)
            nn.init.zeros_(self.score.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[I, N, D] to [I, 1, D]. With zero score weights this is the mean of the group."""
        weights = self.score(self.norm(tokens)).float().softmax(1).to(tokens.dtype)
        pooled: Tensor = weights.transpose(1, 2) @ tokens
        return pooled
