"""Encoded pictures with other scores: the attention that each patch receives from all, in place of that of CLS."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from skipvision.data import easy_vqa
from skipvision.data.assets import Assets
from skipvision.data.scenes import render
from skipvision.data.split import Split
from skipvision.training.feature_cache import FeatureCache, to_pixels
from skipvision.training.precision import compute_dtype
from skipvision.training.scratch_recipe import ScratchRecipe
from skipvision.vision import VisionEncoder


class Received(FeatureCache):
    """The pictures of `cache`; each is composed and encoded once more when it is first asked for."""

    def __init__(self, cache: FeatureCache, encoder: VisionEncoder, image: Callable[[int], Image.Image]) -> None:
        """`image` finds the picture of an index."""
        super().__init__(Path(os.devnull))
        self.extend(cache)
        self.encoder, self.image = copy.deepcopy(encoder).eval().to(compute_dtype()), image
        self.known: dict[int, Tensor] = {}

    @torch.no_grad()
    def gather(self, indices: Sequence[int]) -> dict[str, Tensor]:
        new = [index for index in dict.fromkeys(indices) if index not in self.known]
        if new:
            pixels = torch.stack([torch.from_numpy(to_pixels(self.image(each), self.encoder.config)) for each in new])
            scores = self.encoder(pixels.to(compute_dtype()), "received_attention").attention.float()
            self.known |= dict(zip(new, scores, strict=True))
        return super().gather(indices) | {"cls_attention": torch.stack([self.known[index] for index in indices])}


class Images:
    """The pictures behind the encoded ones, by index: composed ones, and behind those of train easy-VQA's."""

    def __init__(self, recipe: ScratchRecipe, assets: Assets, split: Split) -> None:
        self.recipe, self.assets, self.split = recipe, assets, split

    def __call__(self, index: int) -> Image.Image:
        scenes = self.recipe.data.num_scenes
        if self.split == "train" and index >= scenes:
            return _easy_images(Path(self.recipe.assets), self.recipe.data.easy_vqa)[index - scenes]
        return render(self.assets, index, self.split).image


@lru_cache
def _easy_images(assets: Path, count: int) -> list[Image.Image]:
    return [image for image, _ in islice(easy_vqa.load(assets, "train"), count)]
