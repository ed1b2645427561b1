"""A model that is spoken to in words: simple, and as real as its rows must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
from PIL import Image

from skipvision.config import ModelConfig, SkipConfig, TextConfig, TilesConfig, Transparency, VisionConfig
from skipvision.tiles import Cut, cut_picture
from skipvision.training.conversation import BrokenSampleError, Turn
from skipvision.training.speaker import IGNORE, Spoken

VISION = VisionConfig(
    image_size=28,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    feature_layers=(1, 2),
    select_layer=2,
)
TEXT = TextConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16)
PLAIN = ModelConfig(VISION, TEXT)
SKIPPING = ModelConfig(VISION, TEXT, SkipConfig(num_retained=1, num_skipped=2))
TILED = ModelConfig(VISION, TEXT, tiles=TilesConfig(longest_edge=84))
"""Each tile is a run of rows of its own."""

USER, ASSISTANT, SYSTEM, END, IMAGE = range(5)


@dataclass(frozen=True)
class WordSpeaker:
    """One id a word, one in front of each turn, one behind each answer, one for each view of a tiled picture."""

    tiled: bool = False
    transparency: Transparency = "white"
    image_id: int = IMAGE

    def speak(self, turns: Sequence[Turn], cuts: Sequence[Cut]) -> Spoken:
        roles = [turn.role for turn in turns if turn.role != "system"]
        if roles[0] != "user" or any(first == second for first, second in pairwise(roles)):
            raise BrokenSampleError("user and assistant must alternate")
        ids: list[int] = []
        said: list[bool] = []
        pictures = iter(cuts)
        for turn in turns:
            views = [cut.num_views if self.tiled else 1 for cut in (next(pictures) for _ in range(turn.images))]
            words = [10 + crc32(word.encode()) % 900 for word in turn.content.split()]
            answer = turn.role == "assistant"
            row = [{"user": USER, "assistant": ASSISTANT, "system": SYSTEM}[turn.role], *[IMAGE] * sum(views), *words]
            said += [False] * (1 + sum(views)) + [answer] * (len(words) + answer)
            ids += row + [END] * answer
        following = [*zip(ids[1:], said[1:], strict=True), (0, False)]
        return Spoken(ids, [token if is_said else IGNORE for token, is_said in following])

    def views(self, image: Image.Image, config: ModelConfig, is_alone: bool) -> npt.NDArray[Any]:
        side, count = config.vision.image_size, cut_picture(config, image.height, image.width, is_alone).num_views
        view = np.asarray(image.resize((side, side)), np.float32).transpose(2, 0, 1) / 255
        return np.stack([view] * count)

    def files(self) -> Mapping[str, str]:
        return {"tokenizer.json": f"words {self.tiled}"}
