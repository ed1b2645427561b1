"""Custom ops in domain `svcli`: for each the eager reference and its fake shapes; functions.py has the ONNX functions.

Needs torch and nothing else, so that kernels can be held against these references wherever there is a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUMMARY_EPSILON = 1e-5
"""LayerNorm epsilon of the summary layer (torch's default)."""


@torch.library.custom_op("svcli::token_gather", mutates_args=())
def token_gather(data: Tensor, index: Tensor) -> Tensor:
    """Rows [B, M, D] of `data` [B, N, D] by `index` [B, M] (int64)."""
    return data.gather(1, index[..., None].expand(-1, -1, data.shape[2]))


@token_gather.register_fake
def _token_gather_shape(data: Tensor, index: Tensor) -> Tensor:
    return data.new_empty(data.shape[0], index.shape[1], data.shape[2])


@torch.library.custom_op("svcli::summary_pool", mutates_args=())
def summary_pool(
    tokens: Tensor, norm_weight: Tensor, norm_bias: Tensor, score_weight: Tensor, score_bias: Tensor, epsilon: float
) -> Tensor:
    """[B, 1, D] of `tokens` [B, N, D]: LayerNorm, score by `score_weight` [1, D], softmax over N, weighted sum."""
    normed = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, epsilon)
    scores = torch.nn.functional.linear(normed, score_weight, score_bias)
    weights = scores.float().softmax(1).to(tokens.dtype)
    return weights.transpose(1, 2) @ tokens


@summary_pool.register_fake
def _summary_pool_shape(
    tokens: Tensor,
    norm_weight: Tensor,  # noqa: ARG001
    norm_bias: Tensor,  # noqa: ARG001
    score_weight: Tensor,  # noqa: ARG001
    score_bias: Tensor,  # noqa: ARG001
    epsilon: float,  # noqa: ARG001
) -> Tensor:
    return tokens.new_empty(tokens.shape[0], 1, tokens.shape[2])


@torch.library.custom_op("svcli::cache_write", mutates_args=())
def cache_write(past: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """The buffers `past` [B, G, C, d] with `rows` [B, G, n, d] at `slots` [B, n] (int64, consecutive)."""
    return past.scatter(2, slots[:, None, :, None].expand_as(rows), rows)


@cache_write.register_fake
def _cache_write_shape(past: Tensor, rows: Tensor, slots: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(past)


@torch.library.custom_op("svcli::cache_read", mutates_args=())
def cache_read(buffer: Tensor, length: Tensor) -> Tensor:
    """The first `length` [1] (int64) rows of each `buffer` [B, G, C, d]."""
    return buffer[:, :, : int(length)].clone()


@cache_read.register_fake
def _cache_read_shape(buffer: Tensor, length: Tensor) -> Tensor:  # noqa: ARG001
    rows = torch.library.get_ctx().new_dynamic_size()
    return buffer.new_empty(*buffer.shape[:2], rows, buffer.shape[3])
