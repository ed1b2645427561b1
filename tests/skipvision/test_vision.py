"""The encoder and the projector against plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from skipvision.config import ModelConfig
from tests.skipvision import reference
from tests.skipvision.tiny import random_pictures, tiny_config, tiny_model


@pytest.mark.parametrize(("layers", "select_layer"), [((1, 3), 2), ((0,), 1), ((3, 2, 1), 3)])
def test_features_and_cls_attention_agree_with_plain_loops(layers: tuple[int, ...], select_layer: int) -> None:
    config = tiny_config()
    vision = replace(config.vision, feature_layers=layers, select_layer=select_layer)
    model = tiny_model(ModelConfig(vision, config.text, config.skip))
    pixels, weights = random_pictures(2), reference.weights_of(model)
    with torch.no_grad():
        output = model.vision(pixels)
        tokens = model.projector(output.features)
    for image, picture in enumerate(pixels.numpy()):
        features, attention = reference.encode(weights, vision, picture)
        # fp64 but for the fp32 softmax of the CLS row.
        np.testing.assert_allclose(output.features[image].numpy(), features, rtol=0, atol=1e-10)
        np.testing.assert_allclose(output.attention[image].numpy(), attention, rtol=0, atol=1e-6)
        projected = reference.project(weights, model.config, features)
        np.testing.assert_allclose(tokens[image].numpy(), projected, rtol=0, atol=1e-10)


def test_cls_attention_and_its_share_of_itself_sum_to_the_heads() -> None:
    model = tiny_model()
    with torch.no_grad():
        attention = model.vision(random_pictures(3)).attention
    assert (attention > 0).all()
    assert (attention.sum(1) < model.config.vision.num_heads).all()


def test_every_feature_layer_comes_normalised() -> None:
    model = tiny_model()
    with torch.no_grad():
        features = model.vision(random_pictures(2)).features
    by_layer = features.unflatten(-1, (2, -1))
    means, variances = by_layer.mean(-1), by_layer.var(-1, unbiased=False)
    torch.testing.assert_close(means, torch.zeros_like(means), rtol=0, atol=1e-10)
    # The epsilon of the norm keeps the variance a little below 1.
    torch.testing.assert_close(variances, torch.ones_like(variances), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("layers", "select_layer", "run"), [((1,), 2, 2), ((0, 2), 1, 2), ((0,), 1, 1), ((3,), 1, 3)])
def test_no_block_runs_that_nothing_reads_and_none_asks_twice(
    layers: tuple[int, ...], select_layer: int, run: int
) -> None:
    config = tiny_config()
    vision = replace(config.vision, feature_layers=layers, select_layer=select_layer)
    model = tiny_model(ModelConfig(vision, config.text, config.skip))
    asked: list[nn.Module] = []
    for block in model.vision.blocks:
        block.get_submodule("qkv").register_forward_pre_hook(lambda module, _: asked.append(module))
    with torch.no_grad():
        model.vision(random_pictures(1))
    assert asked == [block.get_submodule("qkv") for block in model.vision.blocks][:run]
    assert vision.num_layers_run == run
