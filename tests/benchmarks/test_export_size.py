"""What exporting is measured with is a model, and what is measured of it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import blocks
from benchmarks.export_size import Memory, chat, export, models, read_random, write_random
from tests.export.tiny import tiny_config


@pytest.mark.parametrize("tied", [True, False])
def test_a_small_one_is_exported_and_asked(tmp_path: Path, tied: bool) -> None:
    config = tiny_config(None, tied=tied, clip=True)
    weights = tmp_path / "weights.safetensors"
    write_random(config, weights)
    model = read_random(config, weights)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert (model.decoder.head.weight is model.decoder.embed.weight) is tied
    found = export(config, weights, tmp_path / "bundle", "int4")
    assert set(found["stages"]) >= set(blocks._EXPORT_STAGES)
    assert sum(stage["seconds"] for stage in found["stages"].values()) <= found["seconds"]
    assert found["anonymous_bytes"] >= max(stage["anonymous_bytes"] for stage in found["stages"].values())
    assert found["bundle_bytes"] == sum(path.stat().st_size for path in (tmp_path / "bundle").iterdir()) - (
        (tmp_path / "bundle" / "manifest.json").stat().st_size
    )
    said = chat(tmp_path / "bundle")
    assert said["rows"] > config.vision.num_patches
    assert 0 < said["prefill_seconds"] < said["first_token_seconds"]
    assert said["tokens_per_second"] > 0


def test_random_weights_repeat_and_are_no_two_alike(tmp_path: Path) -> None:
    config = tiny_config(None, clip=True)
    for name in ("one", "two"):
        write_random(config, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    model = read_random(config, tmp_path / "one")
    first, second = (model.get_parameter(f"decoder.layers.{layer}.ffn.up.weight") for layer in (0, 1))
    assert not torch.equal(first, second)


def test_both_sizes_are_measured_by_name() -> None:
    sizes = {name: config.text.hidden_size for name, config in models().items()}
    assert sorted(sizes.values()) == [896, 4096]
    assert "llava-hf/llava-1.5-7b-hf" in sizes


def test_memory_is_that_since_the_last_look() -> None:
    memory = Memory()
    held: Any = torch.ones(64 << 20, dtype=torch.uint8)
    before = memory.since_last()["anonymous_bytes"]
    del held
    after = memory.since_last()["anonymous_bytes"]
    assert before - after > 32 << 20
    assert memory.stop()["anonymous_bytes"] == before
