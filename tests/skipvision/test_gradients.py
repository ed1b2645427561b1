"""What can be exported can be trained: a gradient reaches all that learns, through selection, merging and tiles."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvision.config import Selector, SkipConfig, Visibility
from skipvision.layout import BatchLayout, TokenLayout, picture_spans
from skipvision.model import SkipVisionModel
from skipvision.tiles import cut_picture
from tests.export.tiny import drawn, resampler_config, tiny_config
from tests.skipvision import zoo

SIZES = ((40, 50), (33, 90))
"""Height and width: of tiles, one is cut and one padded."""
TEXT = (20, 30, 40, 50)


def model_of(name: str, visibility: Visibility | None) -> SkipVisionModel:
    """A model in fp64 whose weights all learn; plain without a `visibility`."""
    if name in ("own", "resampler"):
        config = tiny_config(None) if name == "own" else resampler_config()
        model = drawn(config).double()
    else:
        model = copy.deepcopy(zoo.ours(next(kind for kind in zoo.KINDS if kind.name == name)))
    if visibility is not None:
        retained, skipped = model.config.num_tokens // 3, 5
        if name == "resampler":
            retained = model.config.leading_parts[0]
        selector: Selector = "cls_attention" if model.config.vision.has_cls else "received_attention"
        if name == "resampler":
            selector = "first"
        model = model.with_skip(SkipConfig(retained, skipped, selector, visibility))
        assert model.summary is not None
        nn.init.normal_(model.summary.score.weight, generator=torch.Generator().manual_seed(0))
    return model.requires_grad_()


def shown(model: SkipVisionModel, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Loss of the text behind a picture, in each of two conversations; and the visual rows of all pictures."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    side = config.vision.image_size
    layouts, rows, ids = [], [], []
    for size in SIZES:
        cut = cut_picture(config, *size, is_alone=True)
        pixels = torch.randn(cut.num_views, 3, side, side, generator=generator, dtype=torch.float64)
        spans = picture_spans(config, cut)
        ids.append([*[zoo.IMAGE] * len(spans), *TEXT])
        layouts.append(TokenLayout.of(ids[-1], zoo.IMAGE, config, spans))
        rows.append(model.encode_picture(pixels, cut).flatten(0, 1))
    width = max(map(len, ids))
    table = torch.cat(rows)[None]
    if table.requires_grad:
        table.retain_grad()
    padded = torch.tensor([[*each, *[0] * (width - len(each))] for each in ids])
    batch = BatchLayout.of(layouts, width)
    logits = model(padded, table, batch)
    said = torch.stack(
        [each[length - len(TEXT) : length] for each, length in zip(logits, batch.kept_lengths, strict=True)]
    )
    labels = torch.tensor([*TEXT[1:], 60]).expand(len(SIZES), -1)
    return F.cross_entropy(said.flatten(0, 1), labels.flatten()), table


def unread(model: SkipVisionModel) -> set[str]:
    """Parameters without a say in what the model says."""
    vision, names = model.config.vision, set[str]()
    for layer in range(max(vision.feature_layers), vision.num_layers):
        names |= {f"vision.blocks.{layer}.{name}" for name, _ in model.vision.blocks[layer].named_parameters()}
    if model.summary is not None:
        # They move all inputs of a softmax alike, which does not change it.
        names |= {"summary.norm.bias", "summary.score.bias"}
    return names


NAMES = ["own", "resampler", *(kind.name for kind in zoo.KINDS)]


@pytest.mark.parametrize("visibility", [None, "image", "all"], ids=["plain", "image", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_moves_all_that_learns(name: str, visibility: Visibility | None) -> None:
    model = model_of(name, visibility)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    loss, _ = shown(model)
    loss.backward()  # type: ignore[no-untyped-call]
    idle = unread(model)
    for parameter, each in model.named_parameters():
        if parameter in idle:
            assert each.grad is None or each.grad.abs().max() < 1e-7, parameter  # the softmax is fp32
        else:
            assert each.grad is not None, parameter
            assert each.grad.isfinite().all(), parameter
            assert each.grad.abs().max() > 1e-6, parameter
    torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0).step()
    for parameter, each in model.named_parameters():
        assert parameter in idle or not torch.equal(each, before[parameter]), parameter
    with torch.no_grad():
        assert float(shown(model)[0]) < float(loss)


@pytest.mark.parametrize("visibility", ["image", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_every_visual_row_learns_and_skipped_ones_too(name: str, visibility: Visibility) -> None:
    loss, table = shown(model_of(name, visibility))
    loss.backward()  # type: ignore[no-untyped-call]
    assert table.grad is not None
    assert (table.grad[0].abs().amax(-1) > 1e-12).all()


@pytest.mark.parametrize("name", ["own", "llava", "llava-next on vicuna", "llava-onevision", "smolvlm", "resampler"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """Along a random direction of each part, small enough that the same tokens are retained and merged."""
    model = model_of(name, "image")
    loss, _ = shown(model)
    loss.backward()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(1)
    parts: dict[str, list[nn.Parameter]] = {}
    for parameter, each in model.named_parameters():
        if each.grad is not None:
            parts.setdefault(parameter.split(".")[0], []).append(each)
    assert {"vision", "projector", "summary", "decoder"} <= parts.keys()
    assert ("newline" in parts) == (model.newline is not None)
    for part, parameters in parts.items():
        directions = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in parameters]
        size = math.sqrt(sum(float(each.square().sum()) for each in directions))
        pairs = [(each.grad, way) for each, way in zip(parameters, directions, strict=True) if each.grad is not None]
        slope = sum(float((gradient * way).sum()) for gradient, way in pairs) / size
        losses = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                for each, way in zip(parameters, directions, strict=True):
                    each.add_(way, alpha=step / size)
                losses.append(float(shown(model)[0]))
                for each, way in zip(parameters, directions, strict=True):
                    each.sub_(way, alpha=step / size)
        # RoPE's angles and the summary's softmax are fp32: their rounding, divided by the step, is about 1e-4.
        assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(slope, rel=1e-2, abs=3e-4), part
