"""The checkpoint that loading is measured with is one, and is read as one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.loading import load, write_checkpoint
from skipvision.config import TextConfig
from skipvision.known_models import known_model
from skipvision.published import load_published


def test_a_small_one_is_written_and_loaded(tmp_path: Path) -> None:
    known = known_model("llava-1.5-7b-hf")
    assert known is not None
    vision = replace(
        known.config.vision,
        image_size=28,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        feature_layers=(1,),
        select_layer=1,
    )
    text = TextConfig(50, 32, 48, 5, 4, 2, 8, tie_embeddings=False)
    small = replace(known, config=replace(known.config, vision=vision, text=text, projector_size=32))
    write_checkpoint(small, tmp_path / "checkpoint")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) == 3
    model = load_published(tmp_path / "checkpoint", torch.float16)
    assert model.config.text == replace(text, rms_norm_eps=1e-6, max_positions=2048)
    found = load(tmp_path / "checkpoint")
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["loaded_bytes"] <= found["read_bytes"]
