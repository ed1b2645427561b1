"""A picture and a question as a model takes them, and the skip setting that is asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt
from PIL import Image

from skipvision.config import ModelConfig, SkipConfig
from skipvision.layout import TokenLayout, picture_spans
from skipvision.presets import Setting
from skipvision.tiles import Cut
from svcli_export.chat import ChatTokenizer, Message
from svcli_export.manifest import ChatFormat, ImageProcessing
from svcli_export.pixels import to_views

Skip = SkipConfig | Setting | tuple[int, int] | Literal["off"]
"""A skip setting: whole, one of the paper's, retained and skipped tokens alone with all else as it was trained, or the
plain model."""


class SampleError(ValueError):
    """A chat template that does not show pictures as the model takes them."""


@dataclass(frozen=True)
class Sample:
    """A picture and a question about it."""

    pixels: npt.NDArray[Any]
    """[I, 3, H, W], its views."""
    cut: Cut
    prompt: Sequence[int]
    layout: TokenLayout


def sample_of(
    image: Image.Image,
    question: str,
    config: ModelConfig,
    tokenizer: ChatTokenizer,
    processing: ImageProcessing,
    chat: ChatFormat,
) -> Sample:
    """Of an RGB picture. Raises SampleError."""
    views = to_views(image, processing, config)
    prompt = tokenizer.encode([Message("user", question, images=1)], [views.cut])
    spans = picture_spans(config, views.cut)
    if (found := prompt.count(chat.image_id)) != len(spans):
        raise SampleError(f"the chat template writes {found} placeholders for one picture, not {len(spans)}")
    return Sample(views.pixels, views.cut, prompt, TokenLayout.of(prompt, chat.image_id, config, spans))


def setting_of(config: ModelConfig, asked: Skip | None) -> SkipConfig | Literal["off"] | None:
    """What is asked of a model; its own where nothing is, and None where that is nothing either.

    Raises ConfigError for one of the paper's settings that does not fit the model.
    """
    if isinstance(asked, tuple):
        return config.skip_of(*asked)
    if isinstance(asked, Setting):
        return asked.skip_config(config)
    return config.skip if asked is None else asked
