"""Pictures through the frozen encoder, once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from skipvision.config import VisionConfig
from skipvision.data.questions import Question
from skipvision.training import feature_cache
from skipvision.training.feature_cache import (
    FeatureCache,
    MakePicture,
    Picture,
    cache_key,
    encoded,
    to_pixels,
)
from skipvision.training.precision import compute_dtype
from skipvision.training.scratch_recipe import DataRecipe
from skipvision.vision import VisionEncoder, VisionOutput
from tests.skipvision.tiny import tiny_config

CONFIG = tiny_config().vision


@pytest.fixture
def encoder() -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(CONFIG)


def picture(number: int) -> Picture:
    image = Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    questions = [[Question("what", f"What is {number}?", f"It is {number}.", str(number))], []]
    truth = np.full(16, number, dtype=np.int16)
    return Picture(image, questions, truth, truth + 1)


def pictures(count: int, first: int = 0) -> Iterator[MakePicture]:
    return (partial(picture, number) for number in range(first, first + count))


def silent(_done: int, _new: int) -> None:
    """Reports to nobody."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "SHARD", 4)
    monkeypatch.setattr(feature_cache, "_BATCH", 3)


def test_every_picture_comes_back_in_its_place(tmp_path: Path, encoder: VisionEncoder) -> None:
    done: list[tuple[int, int]] = []
    cache = encoded(tmp_path, pictures(10), encoder, lambda *numbers: done.append(numbers))
    assert done == [(4, 4), (8, 4), (10, 2)]
    assert len(cache) == len(cache.questions) == 10
    assert [draws[0][0].truth for draws in cache.questions] == [str(number) for number in range(10)]
    data = cache.gather([7, 0, 9])
    assert data["labels"].tolist() == [[7] * 16, [0] * 16, [9] * 16]
    assert data["colours"][0].tolist() == [8] * 16
    dtype = compute_dtype()
    with torch.no_grad():
        for row, number in enumerate([7, 0, 9]):
            pixels = to_pixels(picture(number).image, CONFIG)
            features, attention = encoder.to(dtype)(torch.from_numpy(pixels)[None].to(dtype))
            # Features are stored as bf16: 8 bits of values up to about 4. A batch may round otherwise than one picture.
            torch.testing.assert_close(data["features"][row].float(), features[0].float(), rtol=0, atol=0.05)
            torch.testing.assert_close(data["cls_attention"][row], attention[0].float(), rtol=0, atol=0.02)
    assert data["features"].dtype == torch.bfloat16


def test_the_encoder_is_left_as_it_was(tmp_path: Path, encoder: VisionEncoder) -> None:
    encoder.train()
    encoded(tmp_path, pictures(2), encoder, silent)
    assert encoder.training
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_a_killed_encoding_goes_on_where_it_was(
    tmp_path: Path, encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(done: int, _new: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    whole = encoded(tmp_path / "whole", pictures(10), encoder, silent)
    with pytest.raises(KeyboardInterrupt):
        encoded(tmp_path / "killed", pictures(10), encoder, killed)
    assert not (tmp_path / "killed" / "complete").exists()
    runs: list[int] = []
    forward = VisionEncoder.forward

    def counted(self: VisionEncoder, pixels: torch.Tensor) -> VisionOutput:
        runs.append(len(pixels))
        return forward(self, pixels)

    def made(number: int) -> Picture:
        numbers.append(number)
        return picture(number)

    numbers: list[int] = []
    done: list[tuple[int, int]] = []
    monkeypatch.setattr(VisionEncoder, "forward", counted)
    makers = (partial(made, number) for number in range(10))
    cache = encoded(tmp_path / "killed", makers, encoder, lambda *each: done.append(each))
    assert runs == [2]
    assert numbers == [8, 9]
    assert done == [(4, 0), (8, 0), (10, 2)]
    assert cache.questions == whole.questions
    for name, tensor in cache.gather(range(10)).items():
        assert torch.equal(tensor, whole.gather(range(10))[name]), name


def test_a_complete_cache_asks_for_no_picture(tmp_path: Path, encoder: VisionEncoder) -> None:
    encoded(tmp_path, pictures(5), encoder, silent)

    untouched = pictures(5)
    assert len(encoded(tmp_path, untouched, encoder, silent)) == 5
    assert next(untouched)().labels[0] == 0


def test_a_cache_can_be_put_behind_another(tmp_path: Path, encoder: VisionEncoder) -> None:
    first = encoded(tmp_path / "a", pictures(5), encoder, silent)
    first.extend(encoded(tmp_path / "b", pictures(6, first=5), encoder, silent))
    assert len(first) == 11
    assert first.gather([10, 4, 5])["labels"][:, 0].tolist() == [10, 4, 5]
    assert first.questions[10][0][0].truth == "10"


def test_half_a_shard_is_not_read(tmp_path: Path, encoder: VisionEncoder) -> None:
    encoded(tmp_path, pictures(4), encoder, silent)
    (tmp_path / ".00001.safetensors.partial").write_bytes(b"half")
    rows = [[[asdict(question) for question in draw] for draw in each().questions] for each in pictures(2)]
    (tmp_path / "00001.json").write_text(json.dumps(rows), encoding="utf-8")
    assert len(FeatureCache(tmp_path)) == 4


def test_pixels_are_resized_and_normalised() -> None:
    config = VisionConfig(image_size=28, patch_size=14, image_mean=(0.5, 0.25, 0.0), image_std=(0.5, 0.25, 1.0))
    pixels = to_pixels(Image.new("RGB", (64, 64), (255, 0, 51)), config)
    assert pixels.shape == (3, 28, 28)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[:, 3, 4], [1.0, -1.0, 0.2], atol=1e-6)


def test_the_folder_of_a_cache_follows_its_settings() -> None:
    keys = {
        cache_key(CONFIG, DataRecipe()),
        cache_key(replace(CONFIG, select_layer=1), DataRecipe()),
        cache_key(CONFIG, DataRecipe(num_scenes=3)),
    }
    assert len(keys) == 3
    assert cache_key(tiny_config().vision, DataRecipe()) == cache_key(CONFIG, DataRecipe())
