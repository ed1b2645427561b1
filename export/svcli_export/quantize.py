"""Weights as a bundle stores them: fp32, fp16, or 8 bit with one scale per output channel.

int8 is symmetric and weight-only, written as a standard DequantizeLinear in front of MatMul: ONNX Runtime fuses the
pair to its 8 bit kernel while loading, and TensorRT-RTX reads it as it is. Measured choice: see export/README.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from skipvision.config import RANKED, ModelConfig
from skipvision.decoder import rope_table
from skipvision.model import SkipVisionModel
from svcli_export.contract import Contract

Array = npt.NDArray[Any]

TRANSPOSED = ".T"
"""Appended to a checkpoint name where the matrix is stored [in, out], as MatMul wants it."""
SCALE = ".scale"
"""Appended to the stored name of an int8 matrix for its scales [out]."""
ROPE_COS, ROPE_SIN = "decoder.rope.cos", "decoder.rope.sin"
_VECTOR_LIKE = "summary.score"  # [1, D]: pooled over, not multiplied by


def quantize_channels(matrix: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """[in, out] to int8 of the same shape and scales [out]; `int8 * scale` is off by at most half a scale."""
    largest = np.abs(matrix).max(axis=0)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(matrix / scale).astype(np.int8), scale


def num_blocks_read(config: ModelConfig) -> int:
    """Layers of the encoder that something reads; later ones are not exported."""
    ranked = config.skip is not None and config.skip.selector in RANKED
    return max(*config.vision.feature_layers, config.vision.select_layer if ranked else 0)


def stored_tensors(model: SkipVisionModel, contract: Contract) -> dict[str, Array]:
    """Every tensor of `weights.safetensors` by name.

    Matrices of linear layers and the embedding are stored transposed. A tied output head is the embedding.
    """
    dtype = np.dtype(contract.compute_dtype)
    config = model.config
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and name != _VECTOR_LIKE
    }
    unread = tuple(f"vision.blocks.{layer}." for layer in range(num_blocks_read(config), config.vision.num_layers))
    positions = torch.arange(contract.max_positions)[None]
    cos, sin = rope_table(positions, config.text.head_dim, config.text.rope_theta)
    tensors: dict[str, Array] = {ROPE_COS: cos[0].numpy().astype(dtype), ROPE_SIN: sin[0].numpy().astype(dtype)}
    for name, tensor in model.state_dict().items():
        if name.startswith(unread) or (name == "decoder.head.weight" and config.text.tie_embeddings):
            continue
        value: Array = tensor.detach().to(torch.float32).numpy()
        if name not in matrices:
            tensors[name] = value.astype(dtype)
        elif contract.precision == "int8":
            tensors[name + TRANSPOSED], tensors[name + TRANSPOSED + SCALE] = quantize_channels(value.T)
        else:
            tensors[name + TRANSPOSED] = value.T.astype(dtype)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
