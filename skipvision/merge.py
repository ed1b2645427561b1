"""One-shot merge of the tokens that will be skipped (RandomBipartiteSoftMatching in the authors' code)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def merge_tokens(tokens: Tensor, num_merged: int) -> Tensor:
    """[I, N, D] to [I, M, D]: the N - M most redundant tokens are averaged into their nearest remaining one.

    Redundancy is the summed cosine similarity to all others. The result is ordered by decreasing redundancy, not by
    place. M = N returns the input as it is. Gradients flow through the averaged tokens, not through the matching.
    Unlike the authors' code, an all-zero token is no division by zero.
    """
    num_tokens = tokens.shape[1]
    if num_merged == num_tokens:
        return tokens
    if num_merged == 0:
        return tokens[:, :0]
    # The matching is done in fp32 in training too, so that the same tokens are merged there and at inference.
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        unit = F.normalize(tokens.detach().float(), dim=-1, eps=1e-6)
        similarity = unit @ unit.transpose(1, 2)
        redundancy = similarity.sum(-1) - similarity.diagonal(dim1=1, dim2=2)
        order = redundancy.argsort(dim=1, descending=True)
        source, target = order[:, : num_tokens - num_merged], order[:, num_tokens - num_merged :]
        rows = similarity.gather(1, source[..., None].expand(-1, -1, num_tokens))
        nearest = rows.gather(2, target[:, None].expand(-1, source.shape[1], -1)).argmax(-1)
        assigned = F.one_hot(nearest, num_merged)
        counts = 1 + assigned.sum(1).float()[..., None]
    width = tokens.shape[-1]
    merged_in = assigned.to(tokens.dtype).transpose(1, 2) @ tokens.gather(1, source[..., None].expand(-1, -1, width))
    kept = tokens.gather(1, target[..., None].expand(-1, -1, width))
    total = kept + merged_in
    return (total / counts).to(total.dtype)
