"""A model small enough for loops in Python, and prompts for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skipvision.config import ModelConfig, SkipConfig, TextConfig, VisionConfig
from skipvision.layout import BatchLayout, TokenLayout
from skipvision.model import SkipVisionModel
from tests.skipvision import reference

IMAGE = 1
"""Placeholder id."""
VOCAB = 61
NUM_PATCHES = 16

MERGED = SkipConfig(num_retained=5, num_skipped=4)
SKIPS: dict[str, SkipConfig | None] = {
    "merged": MERGED,
    "merged-seen-by-all": SkipConfig(5, 4, visibility="all"),
    "unmerged": SkipConfig(5, 11),
    "one-skipped": SkipConfig(1, 1, visibility="all"),
    "dropped": SkipConfig(5, 0),
    "uniform": SkipConfig(6, 3, selector="uniform"),
    "all-retained": SkipConfig(NUM_PATCHES, 0),
    "plain": None,
}
PROMPTS: dict[str, list[int]] = {
    "image-first": [IMAGE, 7, 8, 9],
    "image-last": [5, 6, 7, IMAGE],
    "image-alone": [IMAGE],
    "image-between": [11, 12, IMAGE, 13],
    "two-images-apart": [20, IMAGE, 21, 22, IMAGE, 23, 24],
    "two-images-together": [IMAGE, IMAGE, 30],
    "text-only": [40, 41, 42, 43, 44],
}

# Where our answer and the reference's may differ. In fp64 the angles of RoPE and the summary's softmax stay fp32
# (6e-8 of values around 1, angles up to 60): 1e-5 leaves one decade of room. In fp32 every sum over 32 to 48 products
# rounds anew, through two layers: errors up to 3e-6 were seen, and 1e-4 leaves more than a decade.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}


def tiny_config(
    skip: SkipConfig | None = MERGED, *, tied: bool = False, position: bool = True, convs: int = 2
) -> ModelConfig:
    """num_heads * head_dim is not hidden_size, and no two sizes are equal: a mix-up cannot pass.

    Untied, since a random tied head repeats the last token for ever, and generation would show nothing.
    """
    vision = VisionConfig(
        image_size=16,
        patch_size=4,
        hidden_size=24,
        intermediate_size=40,
        num_layers=3,
        num_heads=2,
        feature_layers=(1, 3),
        select_layer=2,
    )
    text = TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        tie_embeddings=tied,
    )
    return ModelConfig(vision, text, skip, projector_position=position, projector_size=20, projector_convs=convs)


def tiny_model(
    config: ModelConfig | None = None, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> SkipVisionModel:
    """Random weights that keep values around 1, with norms and biases that are not 1 and 0: a lost one shows."""
    generator = torch.Generator().manual_seed(seed)
    model = SkipVisionModel(config or tiny_config()).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(noise * 0.2 + ("norm" in name and name.endswith("weight")))
    return model.to(dtype)


def random_pictures(count: int, seed: int = 0) -> Tensor:
    """Pixels [I, 3, 16, 16]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Batch:
    """What the model takes for several prompts, and the reference's rows for the same ones."""

    input_ids: Tensor
    visual: Tensor
    layouts: list[TokenLayout]
    batch: BatchLayout
    rows: list[list[reference.Row]]


def batch_of(model: SkipVisionModel, prompts: Sequence[Sequence[int]], seed: int = 0) -> Batch:
    """Every image placeholder shows a picture of its own."""
    width = max(map(len, prompts))
    input_ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in prompts])
    counts = [list(ids).count(IMAGE) for ids in prompts]
    pixels = random_pictures(sum(counts), seed).to(model.decoder.embed.weight.dtype)
    weights = reference.weights_of(model)
    pictures = [picture_tokens(weights, model.config, each) for each in pixels]
    starts = np.cumsum([0, *counts])
    layouts = [TokenLayout.of(ids, IMAGE, model.config) for ids in prompts]
    with torch.no_grad():
        visual = model.encode_images(pixels)
    rows = [
        reference.prompt_rows(weights, model.config, ids, IMAGE, pictures[start : start + count])
        for ids, start, count in zip(prompts, starts, counts, strict=False)
    ]
    return Batch(input_ids, visual, layouts, BatchLayout.of(layouts, width), rows)


def picture_tokens(
    weights: reference.Weights, config: ModelConfig, pixels: Tensor
) -> tuple[reference.Array, reference.Array]:
    """The reference's projected patches of one picture, and the scores that rank them."""
    skip = config.skip
    selector = "cls_attention" if skip is None else skip.selector
    features, paid = reference.encode(weights, config.vision, pixels.double().numpy(), selector)
    scores = paid if skip is None else reference.ranking(selector, paid, skip.num_retained, config.num_tokens)
    return reference.project(weights, config, features), scores
