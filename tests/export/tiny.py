"""A model small enough to export in a second, with weights that make its choices clear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import nn

from skipvision.checkpoint import save_checkpoint
from skipvision.config import ModelConfig, ResamplerConfig, SkipConfig, TextConfig, TilesConfig, VisionConfig
from skipvision.layout import TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.tiles import cut_picture
from skipvision.tokenizer import CHAT_TEMPLATE, train_tokenizer
from svcli_export.samples import Sample

VOCAB = 300
IMAGE_SIZE = 28
NUM_PATCHES = 16
SKIP = SkipConfig(num_retained=4, num_skipped=6)
SKIP_SETTINGS: dict[str, SkipConfig | None] = {
    "skip": SKIP,
    "skip-seen-by-all": SkipConfig(4, 6, visibility="all"),
    "no-merge": SkipConfig(4, 12),
    "uniform": SkipConfig(4, 6, selector="uniform"),
    "uniform-drop": SkipConfig(4, 0, selector="uniform"),
    "drop": SkipConfig(4, 0),
    "all-retained": SkipConfig(16, 0),
    "plain": None,
}


def tiny_config(skip: SkipConfig | None = SKIP, *, tied: bool = True, clip: bool = False) -> ModelConfig:
    """`clip`: with a tower and a projector as LLaVA-1.5 has them."""
    vision = VisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=7,
        hidden_size=32,
        intermediate_size=64,
        num_layers=3,
        num_heads=2,
        feature_layers=(1, 2),
        select_layer=2,
    )
    text = TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        tie_embeddings=tied,
    )
    if not clip:
        return ModelConfig(vision, text, skip)
    tower = replace(vision, activation="quick_gelu", embedding_norm=True, feature_norm=False, feature_layers=(2,))
    return ModelConfig(tower, text, skip, projector_size=32, projector_norm=False, projector_position=False)


def family_config(family: str, skip: SkipConfig | None = None) -> ModelConfig:
    """As the family has it; one view is 16 tokens."""
    plain = tiny_config(None, clip=True)
    siglip = replace(plain.vision, activation="gelu_tanh", has_cls=False, embedding_norm=False, select_layer=2)
    sides = tuple((lines * IMAGE_SIZE, columns * IMAGE_SIZE) for lines in (1, 2, 3) for columns in (1, 2, 3))
    if family == "llava":
        return replace(plain, skip=skip)
    if family == "llava_next":
        return replace(plain, skip=skip, tiles=TilesConfig(sides[1:5]))
    if family == "llava_onevision":  # the patches leave an edge over
        siglip = replace(siglip, patch_size=6)
        tiles = TilesConfig(sides, max_tiles=2, among_others=False)
        text = replace(plain.text, qkv_bias=True)
        return replace(plain, vision=siglip, text=text, skip=skip, tiles=tiles)
    assert family == "smolvlm"
    siglip = replace(siglip, image_size=32, patch_size=4, output_norm=True, feature_layers=(3,))
    tiles = TilesConfig(longest_edge=64)
    return replace(plain, vision=siglip, skip=skip, tiles=tiles, projector="linear", pixel_shuffle=2)


def resampler_config(skip: SkipConfig | None = None) -> ModelConfig:
    """With Chain-of-Sight's resampler: 3 + 8 + 32 tokens."""
    plain = tiny_config(None, clip=True)
    vision = replace(plain.vision, image_size=32, patch_size=4, feature_layers=(1, 3))
    resampler = ResamplerConfig(windows=(8, 4, 2), queries=(3, 2, 2), num_heads=4, mlp_ratio=2)
    return replace(plain, vision=vision, skip=skip, projector="resampler", resampler=resampler)


FAMILIES = ("llava", "llava_next", "llava_onevision", "smolvlm")


def tiny_model(skip: SkipConfig | None = SKIP, *, tied: bool = True, clip: bool = False) -> SkipVisionModel:
    """Random, but with norms, biases and positions that are not 0 or 1, so that a lost one shows."""
    return drawn(tiny_config(skip, tied=tied, clip=clip))


def drawn(config: ModelConfig) -> SkipVisionModel:
    """The same of any sizes."""
    generator = torch.Generator().manual_seed(0)
    model = SkipVisionModel(config).eval()

    def draw(tensor: torch.Tensor, mean: float, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                is_scale = "norm" in name and name.endswith("weight")
                draw(parameter, 1.0 if is_scale else 0.0, 0.1 if is_scale else 0.3)
            else:
                draw(parameter, 0.0, parameter.shape[-1] ** -0.5)
        draw(model.vision.position, 0.0, 1.0)
        draw(model.decoder.embed.weight, 0.0, 0.5)
        if not config.text.tie_embeddings:
            assert isinstance(model.decoder.head, nn.Linear)
            draw(model.decoder.head.weight, 0.0, 0.5)
    return model


def tiny_checkpoint(folder: Path, skip: SkipConfig | None = SKIP, *, tied: bool = True, clip: bool = False) -> Path:
    tokenizer = train_tokenizer(["what is this? a red ball", "how many cats? three"], VOCAB)
    save_checkpoint(tiny_model(skip, tied=tied, clip=clip), folder, own_files(tokenizer))
    return folder


def own_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Beside the weights of a model of our own."""
    return {"tokenizer.json": tokenizer.to_str(), "chat_template.jinja": CHAT_TEMPLATE}


def asked(model: SkipVisionModel, pixels: npt.NDArray[np.float32], prompt: Sequence[int]) -> list[Sample]:
    """The ids `prompt` about each of `pixels` [N, 3, H, W], which are seen once; id 1 stands for the picture."""
    cut = cut_picture(replace(model.config, tiles=None), *pixels.shape[2:])
    return [Sample(each[None], cut, prompt, TokenLayout.of(prompt, 1, model.config)) for each in pixels]
