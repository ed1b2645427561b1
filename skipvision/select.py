"""Which patches are retained: top-k by a score, both groups left in raster order."""

from __future__ import annotations

import torch
from torch import Tensor

from skipvision.config import Selector


def patch_scores(
    selector: Selector, cls_attention: Tensor, num_retained: int, generator: torch.Generator | None = None
) -> Tensor:
    """[I, P] scores by which patches are ranked; `cls_attention` is [I, P].

    `random` draws anew at each call, from `generator` if given; `uniform` prefers an even stride over the raster. Both
    are baselines.
    """
    if selector == "cls_attention":
        return cls_attention
    if selector == "random":
        return torch.empty_like(cls_attention).uniform_(generator=generator)
    num_patches = cls_attention.shape[1]
    taken = (torch.arange(num_retained, device=cls_attention.device) * num_patches) // num_retained
    return torch.zeros_like(cls_attention).index_fill(1, taken, 1.0)


def split_patches(scores: Tensor, num_retained: int) -> tuple[Tensor, Tensor]:
    """Indices of the retained [I, R] and the other [I, P-R] patches, each in raster order."""
    images, num_patches = scores.shape
    top = scores.topk(num_retained, dim=1).indices
    raster = torch.arange(num_patches, device=scores.device, dtype=torch.float32).expand(images, -1)
    key = (raster + num_patches).scatter(1, top, raster.gather(1, top))
    order = key.argsort(dim=1)
    return order[:, :num_retained], order[:, num_retained:]
