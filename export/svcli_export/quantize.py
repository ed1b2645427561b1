"""Weights as a bundle stores them: fp32, fp16, 8 bit with a scale per output channel, or 4 bit in blocks.

Both are weight-only, written as a standard DequantizeLinear in front of MatMul: ONNX Runtime fuses the pair to its 8
and 4 bit kernels while loading. Measured choices: see export/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvision.config import RANKED, ModelConfig
from skipvision.decoder import rope_table
from skipvision.model import SkipVisionModel
from svcli_export.contract import Contract
from svcli_export.weights import Piece, TensorInfo

Array = npt.NDArray[Any]

TRANSPOSED = ".T"
"""Appended to a checkpoint name where the matrix is stored [in, out], as MatMul wants it."""
SCALE = ".scale"
"""Appended to the stored name of a matrix for its scales: [out] of int8, [blocks, out] of int4."""
ZERO = ".zero"
"""Appended to the stored name of an int4 matrix for the number that stands for 0 in each block, [blocks, out]."""
BLOCK = 32
"""Weights along the input dimension that share a scale and a zero point in int4."""
ROPE_COS, ROPE_SIN = "decoder.rope.cos", "decoder.rope.sin"
_VECTOR_LIKE = "summary.score"  # [1, D]: pooled over, not multiplied by
_IN_BLOCKS = "decoder.layers."
_LEVELS = 15


def quantize_channels(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] to int8 [in, out] and fp32 scales [out]; `int8 * scale` is off by at most half a scale."""
    wide = matrix.float()
    largest = wide.abs().amax(1)
    scale = torch.where(largest > 0, largest / 127, 1)
    return (wide / scale[:, None]).round_().to(torch.int8).T, scale


def quantize_blocks(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[out, in] to numbers 0..15 [in, out], fp32 scales [blocks, out] and zero points 0..15 [blocks, out].

    `(number - zero) * scale` is off by at most a scale, and by half a scale but where both ends of a block are rounded
    the same way. 0 stays 0.
    """
    rows, columns = matrix.shape
    wide = torch.zeros(rows, columns + -columns % BLOCK)
    wide[:, :columns] = matrix
    blocks = wide.view(rows, -1, BLOCK)
    low, high = blocks.amin(2).clamp_(max=0), blocks.amax(2).clamp_(min=0)
    scale = torch.where(high > low, (high - low) / _LEVELS, 1)
    zero = (-low / scale).round_()
    blocks.div_(scale[..., None]).round_().add_(zero[..., None]).clamp_(0, _LEVELS)
    return wide[:, :columns].to(torch.uint8).T, scale.T, zero.to(torch.uint8).T


def pack(numbers: Tensor) -> Tensor:
    """[n, out] of 0..15, `out` even, to bytes [n, out / 2]: two in each, the first one low."""
    return numbers[:, 0::2] | numbers[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """`pack` undone, as fp32."""
    rows, pairs = packed.shape
    numbers = torch.empty(rows, pairs, 2)
    numbers[..., 0], numbers[..., 1] = packed & 15, packed >> 4
    return numbers.view(rows, 2 * pairs)


def dequantize_blocks(packed: Tensor, scale: Tensor, packed_zero: Tensor) -> Tensor:
    """What `quantize_blocks` gave and `pack` packed, as fp32 [in, out]."""
    numbers = unpack(packed)
    rows, columns = numbers.shape
    if short := -rows % BLOCK:
        numbers = F.pad(numbers, (0, 0, 0, short))
    blocks = numbers.view(-1, BLOCK, columns)
    return blocks.sub_(unpack(packed_zero)[:, None]).mul_(scale[:, None]).view(-1, columns)[:rows]


def num_blocks_read(config: ModelConfig) -> int:
    """Layers of the encoder that something reads; later ones are not exported."""
    ranked = config.skip is not None and config.skip.selector in RANKED
    return max(*config.vision.feature_layers, config.vision.select_layer if ranked else 0)


def stored_tensors(
    model: SkipVisionModel, contract: Contract, num_blocks: int | None = None, num_positions: int | None = None
) -> Iterator[Piece]:
    """Every tensor of `weights.safetensors`, in pieces that are made when they are written.

    Matrices of linear layers and the embedding are stored transposed. A tied output head is the embedding. `num_blocks`
    layers of the encoder and `num_positions` rows of the rotary tables are stored, those that the model itself reads
    where neither is given.
    """
    dtype = np.dtype(contract.compute_dtype)
    config = model.config
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and name != _VECTOR_LIKE
    }
    first_unread = num_blocks_read(config) if num_blocks is None else num_blocks
    unread = tuple(f"vision.blocks.{layer}." for layer in range(first_unread, config.vision.num_layers))
    positions = torch.arange(contract.max_positions if num_positions is None else num_positions)[None]
    for name, table in zip(
        (ROPE_COS, ROPE_SIN), rope_table(positions, config.text.head_dim, config.text.rope_theta), strict=True
    ):
        yield _plain(name, table[0], dtype)
    for name, tensor in model.state_dict().items():
        if name.startswith(unread) or (name == "decoder.head.weight" and config.text.tie_embeddings):
            continue
        if name not in matrices:
            yield _plain(name, tensor, dtype)
        elif contract.precision == "int4" and name.startswith(_IN_BLOCKS) and tensor.shape[0] % 2 == 0:
            yield _in_blocks(name + TRANSPOSED, tensor)
        elif contract.precision in ("int8", "int4"):
            yield _in_channels(name + TRANSPOSED, tensor)
        else:
            yield _plain(name + TRANSPOSED, tensor.T, dtype)


def _plain(name: str, tensor: Tensor, dtype: np.dtype[Any]) -> Piece:
    return _piece({name: TensorInfo(dtype, tuple(tensor.shape))}, lambda: (tensor,))


def _in_channels(name: str, matrix: Tensor) -> Piece:
    rows, columns = matrix.shape
    infos = {name: TensorInfo(np.int8, (columns, rows)), name + SCALE: TensorInfo(np.float32, (rows,))}
    return _piece(infos, lambda: quantize_channels(matrix))


def _in_blocks(name: str, matrix: Tensor) -> Piece:
    rows, columns = matrix.shape
    blocks = -(-columns // BLOCK)
    infos = {
        name: TensorInfo(np.uint8, (columns, rows // 2)),
        name + SCALE: TensorInfo(np.float32, (blocks, rows)),
        name + ZERO: TensorInfo(np.uint8, (blocks, rows // 2)),
    }

    def make() -> tuple[Tensor, ...]:
        numbers, scale, zero = quantize_blocks(matrix)
        return pack(numbers), scale, pack(zero)

    return _piece(infos, make)


def _piece(infos: Mapping[str, TensorInfo], make: Callable[[], tuple[Tensor, ...]]) -> Piece:
    """`make` gives a tensor for each of `infos`, in any float dtype where a float is wanted."""

    def made() -> Mapping[str, Array]:
        with torch.no_grad():
            pairs = zip(infos.items(), make(), strict=True)
            return {name: _array(tensor, np.dtype(info.dtype)) for (name, info), tensor in pairs}

    return Piece(infos, made)


def _array(tensor: Tensor, dtype: np.dtype[Any]) -> Array:
    kinds = {"float32": torch.float32, "float16": torch.float16}
    wanted = tensor.detach().to(kinds.get(dtype.name, tensor.dtype))
    return wanted.contiguous().numpy()
