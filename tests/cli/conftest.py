"""A checkpoint and a bundle of a tiny random model, and a picture to ask it about."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from skipvision.checkpoint import save_checkpoint
from skipvision.config import ModelConfig, SkipConfig, TextConfig, VisionConfig
from skipvision.model import SkipVisionModel
from skipvision.tokenizer import CHAT_TEMPLATE, train_tokenizer
from skipvision.training.scratch import initialise
from svcli_export.bundle import export_bundle

ROOT = Path(__file__).parents[2]
SENTENCES = ["What is this?", "A red ball is left of the blue dog.", "How many cups are there?"]
VISION = VisionConfig(
    image_size=56,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    feature_layers=(1, 2),
    select_layer=2,
)
TEXT = TextConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    tie_embeddings=False,
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that never ends its answer, and says nothing but letters."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(SENTENCES, 320)
    text = replace(TEXT, vocab_size=tokenizer.get_vocab_size())
    model = SkipVisionModel(ModelConfig(VISION, text, SkipConfig(num_retained=4, num_skipped=4)))
    initialise(model)
    with torch.no_grad():
        for token, number in tokenizer.get_vocab().items():
            if not token.isascii() or not token.isalpha():
                model.decoder.head.weight[number] = 0
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    files = {"tokenizer.json": tokenizer.to_str(pretty=True), "chat_template.jinja": CHAT_TEMPLATE}
    save_checkpoint(model.eval(), folder, files)
    return folder


@pytest.fixture(scope="session")
def bundle(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("bundle")
    export_bundle(checkpoint, folder, precision="fp32", max_context=96, max_images=2)
    return folder


@pytest.fixture(scope="session")
def long_bundle(checkpoint: Path) -> Path:
    """The same model with room for answers that take seconds."""
    folder = checkpoint.with_name("long_bundle")
    export_bundle(checkpoint, folder, precision="fp32", max_context=20_000, max_images=1, default_variants=False)
    return folder


@pytest.fixture(scope="session")
def picture(checkpoint: Path) -> Path:
    path = checkpoint.with_name("red.png")
    Image.new("RGB", (64, 48), "red").save(path)
    return path


@pytest.fixture(scope="session")
def command() -> list[str]:
    """svcli as a process of its own, from the source tree."""
    paths = [str(ROOT), str(ROOT / "export"), str(ROOT / "engines")]
    return [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}; from svcli.__main__ import main; main()"]
