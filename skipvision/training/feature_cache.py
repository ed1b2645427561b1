"""Pictures go through the frozen encoder once; training reads the result from disk.

A cache is a folder of shards. A shard is whole or absent (atomic writes), so a killed run goes on where it was.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from skipvision.checkpoint import save_tensors
from skipvision.config import VisionConfig
from skipvision.data import easy_vqa
from skipvision.data.assets import Assets
from skipvision.data.questions import Question, ask
from skipvision.data.scenes import render
from skipvision.data.split import Split
from skipvision.training.precision import compute_dtype
from skipvision.training.scratch_recipe import DataRecipe
from skipvision.vision import VisionEncoder

SHARD = 512
_BATCH = 16


@dataclass(frozen=True)
class Picture:
    """One picture before the encoder. Patch truths are -1 where nothing is known."""

    image: Image.Image
    questions: list[list[Question]]
    labels: np.ndarray[Any, np.dtype[np.int16]]
    colours: np.ndarray[Any, np.dtype[np.int16]]


MakePicture = Callable[[], Picture]
"""Makes a picture when it is needed: those of a shard that is already there never are."""


def scene_pictures(
    assets: Assets, split: Split, seeds: Sequence[int], draws: int, questions_per_draw: int
) -> Iterator[MakePicture]:
    """Composed pictures; each draw asks other questions. Test wordings everywhere but in train."""
    for seed in seeds:
        yield partial(_scene_picture, assets, split, seed, draws, questions_per_draw)


def _scene_picture(assets: Assets, split: Split, seed: int, draws: int, questions_per_draw: int) -> Picture:
    wordings: Literal["train", "test"] = "train" if split == "train" else "test"
    scene = render(assets, seed, split)
    questions = [
        ask(scene, np.random.default_rng((seed, draw)), wordings=wordings, per_picture=questions_per_draw)
        for draw in range(draws)
    ]
    return Picture(scene.image, questions, scene.labels.ravel(), scene.colours.ravel().astype(np.int16))


def easy_vqa_pictures(root: Path, split: str, patches: int) -> Iterator[MakePicture]:
    """The pictures of easy-VQA in their official split."""
    unknown = np.full(patches, -1, dtype=np.int16)
    for image, questions in easy_vqa.load(root, "train" if split == "train" else "test"):
        yield partial(Picture, image, [questions], unknown, unknown)


def to_pixels(image: Image.Image, config: VisionConfig) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[3, H, W] of a square RGB picture, resized bicubically and normalised."""
    side = config.image_size
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    scaled = np.asarray(image, dtype=np.float32) / 255
    mean, std = (np.array(values, dtype=np.float32) for values in (config.image_mean, config.image_std))
    pixels: np.ndarray[Any, np.dtype[np.float32]] = ((scaled - mean) / std).transpose(2, 0, 1)
    return pixels


class FeatureCache:
    """Encoded pictures, memory-mapped: index a picture, get its tensors and questions."""

    def __init__(self, directory: Path) -> None:
        self.questions: list[list[list[Question]]] = []
        self._where: list[tuple[int, int]] = []
        self._shards: list[dict[str, Tensor]] = []
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._shards.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            rows = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            self.questions += [[[Question(**question) for question in draw] for draw in draws] for draws in rows]
            self._where += [(len(self._shards) - 1, row) for row in range(len(rows))]

    def __len__(self) -> int:
        return len(self._where)

    def extend(self, other: FeatureCache) -> None:
        """Puts the pictures of `other` behind these."""
        self._where += [(len(self._shards) + shard, row) for shard, row in other._where]
        self._shards += other._shards
        self.questions += other.questions

    def gather(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """features [n, P, F] bf16, cls_attention [n, P], labels [n, P] and colours [n, P]."""
        found = [(self._shards[shard], row) for shard, row in (self._where[index] for index in indices)]
        return {name: torch.stack([tensors[name][row] for tensors, row in found]) for name in found[0][0]}


def cache_key(vision: VisionConfig, data: DataRecipe) -> str:
    """Names the folder of what depends on these settings."""
    return hashlib.sha256(json.dumps([asdict(vision), asdict(data)]).encode()).hexdigest()[:12]


Done = Callable[[int, int], None]
"""Gets the number of pictures that are done, and how many of them were encoded since it was last called."""


def encoded(directory: Path, pictures: Iterator[MakePicture], encoder: VisionEncoder, report: Done) -> FeatureCache:
    """The cache in `directory`, filled from `pictures` where it is not complete."""
    complete = directory / "complete"
    if not complete.exists():
        _fill(directory, pictures, encoder, report)
        complete.touch()
    return FeatureCache(directory)


@torch.no_grad()
def _fill(directory: Path, pictures: Iterator[MakePicture], encoder: VisionEncoder, report: Done) -> None:
    """Encodes what is not yet in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    dtype = compute_dtype()
    encoder = copy.deepcopy(encoder).eval().to(dtype)
    for number in count():
        path = directory / f"{number:05d}.safetensors"
        makers = list(islice(pictures, SHARD))
        if not makers:
            return
        missing = not path.exists()
        if missing:
            chunk = [make() for make in makers]
            outputs = [
                encoder(_pixel_batch(chunk[start : start + _BATCH], encoder.config).to(dtype))
                for start in range(0, len(chunk), _BATCH)
            ]
            rows = json.dumps([[[asdict(q) for q in draw] for draw in picture.questions] for picture in chunk])
            partial = path.with_suffix(".json.partial")
            partial.write_text(rows, encoding="utf-8")
            os.replace(partial, path.with_suffix(".json"))
            tensors = {
                "features": torch.cat([output.features.bfloat16() for output in outputs]),
                "cls_attention": torch.cat([output.attention.float() for output in outputs]),
                "labels": torch.from_numpy(np.stack([picture.labels for picture in chunk])),
                "colours": torch.from_numpy(np.stack([picture.colours for picture in chunk])),
            }
            save_tensors(tensors, path)
        report(number * SHARD + len(makers), len(makers) if missing else 0)


def _pixel_batch(pictures: Sequence[Picture], config: VisionConfig) -> Tensor:
    pixels = np.stack([to_pixels(picture.image, config) for picture in pictures])
    return torch.from_numpy(pixels)
