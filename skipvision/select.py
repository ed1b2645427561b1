"""Which tokens are retained: top-k by a score, both groups left in raster order."""

from __future__ import annotations

import torch
from torch import Tensor

from skipvision.config import RANKED, Selector


def token_scores(
    selector: Selector, attention: Tensor, num_retained: int, generator: torch.Generator | None = None
) -> Tensor:
    """[I, T] scores by which tokens are ranked; `attention` [I, T] is what the encoder pays to each of them.

    `random` draws anew at each call, from `generator` if given; `uniform` prefers an even stride over the raster. Both
    are baselines. `first` prefers the first tokens: a thumbnail's, where tiles stand behind it, or those of the coarse
    scales of a resampler.
    """
    if selector in RANKED:
        return attention
    if selector == "random":
        return torch.empty_like(attention).uniform_(generator=generator)
    taken = torch.arange(num_retained, device=attention.device)
    if selector == "uniform":
        taken = taken * attention.shape[1] // num_retained
    return torch.zeros_like(attention).index_fill(1, taken, 1.0)


def split_tokens(scores: Tensor, num_retained: int) -> tuple[Tensor, Tensor]:
    """Indices of the retained [I, R] and the other [I, T-R] tokens, each in raster order."""
    images, num_tokens = scores.shape
    top = scores.topk(num_retained, dim=1).indices
    raster = torch.arange(num_tokens, device=scores.device, dtype=torch.float32).expand(images, -1)
    key = (raster + num_tokens).scatter(1, top, raster.gather(1, top))
    order = key.argsort(dim=1)
    return order[:, :num_retained], order[:, num_retained:]
