"""Skip-Vision's motivation measured on pictures: from a model that is read to a profile of each picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from skipvision.config import SkipConfig
from skipvision.layout import TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.profile import Profile, ProfileError, Sample, Spread, measure
from skipvision.tokenizer import IMAGE
from svcli_export.chat import ChatTokenizer, Message
from svcli_export.manifest import ImageProcessing
from svcli_export.pixels import to_pixels
from svcli_export.source import Source, SourceError

Progress = Callable[[int, int], None]
"""Called with how many pictures are done, and of how many."""


@dataclass(frozen=True)
class Measurement:
    """What was measured, on how many pictures, with which setting."""

    skip: SkipConfig
    is_trained: bool
    """Whether the model was trained with this very setting."""
    profiles: tuple[Profile, ...]
    """One of each picture."""

    @property
    def spread(self) -> Spread:
        return Spread.of(self.profiles)


def measure_pictures(
    source: Source,
    pictures: Sequence[Image.Image],
    question: str,
    counts: tuple[int, int] | None = None,
    progress: Progress = lambda _done, _total: None,
) -> Measurement:
    """Profiles the model once for each RGB picture, with the same question.

    `counts` are retained and skipped tokens; without them a model is measured as it was trained. A plain model lets
    every later row see every other, so skipped ones stay in sight there.

    Raises ProfileError for a plain model without `counts` or without a summary layer, ConfigError for counts that do
    not fit, SourceError for a bundle without the layers that they need, or a tokenizer or template that does not work.
    """
    trained = source.model.config.skip
    if counts is None and trained is None:
        raise ProfileError("this model does not skip; name a setting by --skip, such as --skip 64/64")
    skip = trained or SkipConfig(visibility="all")
    if counts is not None:
        skip = replace(skip, num_retained=counts[0], num_skipped=counts[1])
    model = source.model if skip == trained else _with_skip(source.model, skip)
    source.check(model.config)
    ids, image_id = _prompt(source, question)
    layout = TokenLayout.of(ids, image_id, model.config)
    vision = model.config.vision
    processing = ImageProcessing(image_size=vision.image_size, mean=vision.image_mean, std=vision.image_std)

    def samples() -> Iterator[Sample]:
        for picture in pictures:
            pixels = torch.from_numpy(np.stack([to_pixels(picture, processing)]))
            with torch.no_grad():
                # The random selector draws the same for every picture, and in every run.
                features, cls_attention = model.vision(pixels)
                visual = model.visual_rows(features, cls_attention, torch.Generator().manual_seed(0))
            yield Sample(ids, visual, layout)

    profiles = []
    progress(0, len(pictures))
    for profile in measure(model, samples()):
        profiles.append(profile)
        progress(len(profiles), len(pictures))
    return Measurement(skip, skip == trained, tuple(profiles))


def _prompt(source: Source, question: str) -> tuple[list[int], int]:
    """Ids of a question about one picture, and the id that stands for it."""
    try:
        tokenizer = ChatTokenizer(source.tokenizer, source.template)
        ids = tokenizer.encode([Message("user", question, images=1)])
    except Exception as error:  # the tokenizers library raises plain Exception
        raise SourceError(f"its tokenizer or chat template does not work ({error})") from None
    image_id = tokenizer.tokenizer.token_to_id(IMAGE)
    if image_id is None or ids.count(image_id) != 1:
        raise SourceError(f"its chat template does not write one {IMAGE} token for one picture")
    return ids, image_id


def _with_skip(model: SkipVisionModel, skip: SkipConfig) -> SkipVisionModel:
    try:
        return model.with_skip(skip)
    except RuntimeError:
        raise ProfileError(
            "this is a plain model and has no summary layer, so it cannot skip; train it with skipping"
        ) from None
