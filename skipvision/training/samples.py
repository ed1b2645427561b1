"""A conversation as a model reads it: ids, rows and pixels, or why it cannot be read. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
from PIL import Image

from skipvision.config import ModelConfig
from skipvision.layout import TokenLayout, picture_spans
from skipvision.pictures import MAX_FILE_BYTES, ImageError, decode_picture, picture_size
from skipvision.tiles import Cut, cut_picture
from skipvision.training.conversation import BrokenSampleError, Conversation, Picture, Source
from skipvision.training.speaker import IGNORE, Speaker, Spoken

Views = tuple[npt.NDArray[Any], Cut]
"""[I, 3, S, S] of one picture, and how it was cut."""


@dataclass(frozen=True)
class Sample:
    """All that training shows of one conversation."""

    name: str
    spoken: Spoken
    layout: TokenLayout
    views: tuple[Views, ...]
    """Of its pictures, in order."""


@dataclass(frozen=True)
class Measure:
    """How large a sample is."""

    rows: int
    """Visual ones included, skipped ones too."""
    kept: int
    """Rows that pass the FFN."""
    visual: int
    """Visual rows."""
    visual_kept: int
    visual_plain: int
    """Visual rows of the plain model."""
    answers: int
    """Rows that have something to say."""
    pictures: int


def read_sample(source: Source, index: int, speaker: Speaker, config: ModelConfig, max_length: int) -> Sample:
    """Sample `index` of `source`, with pixels.

    Raises BrokenSampleError with the reason, also where it has more rows than `max_length`.
    """
    conversation = source[index]
    spoken, layout, cuts = _read(conversation, speaker, config, max_length)
    pictures = zip(conversation.pictures, cuts, strict=True)
    views = tuple(_views(picture, cut, speaker, config, len(cuts) == 1) for picture, cut in pictures)
    return Sample(conversation.name, spoken, layout, views)


def measure_sample(
    source: Source, index: int, speaker: Speaker, config: ModelConfig, max_length: int, *, decode: bool = False
) -> Measure:
    """The size of sample `index` of `source`, from the headers of its pictures; they are read to their ends where
    `decode` is set. Raises what `read_sample` does.
    """
    conversation = source[index]
    spoken, layout, _ = _read(conversation, speaker, config, max_length)
    if decode:
        for picture in conversation.pictures:
            _decoded(picture, speaker)
    return Measure(
        rows=layout.length,
        kept=layout.num_kept,
        visual=sum(span.length for span in layout.images),
        visual_kept=sum(span.num_kept for span in layout.images),
        visual_plain=sum(span.num_tokens for span in layout.images),
        answers=sum(label != IGNORE for label in spoken.labels),
        pictures=len(conversation.pictures),
    )


def _read(
    conversation: Conversation, speaker: Speaker, config: ModelConfig, max_length: int
) -> tuple[Spoken, TokenLayout, tuple[Cut, ...]]:
    """All but pixels."""
    is_alone = len(conversation.pictures) == 1
    if len(conversation.pictures) > max_length:  # each of which would be opened
        reason = f"{len(conversation.pictures):,} pictures, and at most {max_length:,} rows are allowed"
        raise BrokenSampleError(reason, "too long")
    cuts = tuple(_cut(picture, config, is_alone) for picture in conversation.pictures)
    spoken = speaker.speak(conversation.turns, cuts)
    spans = [span for cut in cuts for span in picture_spans(config, cut)]
    try:
        layout = TokenLayout.of(spoken.ids, speaker.image_id, config, spans)
    except ValueError as error:
        raise BrokenSampleError(f"its prompt has {error}") from None
    if layout.length > max_length:
        raise BrokenSampleError(f"{layout.length:,} rows, and at most {max_length:,} are allowed", "too long")
    if all(label == IGNORE for label in spoken.labels):
        raise BrokenSampleError("has no answer to learn from", "no answer")
    return spoken, layout, cuts


def _cut(picture: Picture, config: ModelConfig, is_alone: bool) -> Cut:
    with picture.open() as file:
        if config.tiles is not None:
            try:
                height, width = picture_size(picture.name, file)
            except ImageError as error:
                raise BrokenSampleError(str(error), "broken picture") from None
            return cut_picture(config, height, width, is_alone)
        if not file.read(1):
            raise BrokenSampleError(f"{picture.name}: the file is empty", "broken picture")
    return Cut(config.vision.image_size, config.vision.image_size)


def _views(picture: Picture, cut: Cut, speaker: Speaker, config: ModelConfig, is_alone: bool) -> Views:
    image = _decoded(picture, speaker)
    seen = cut_picture(config, image.height, image.width, is_alone)
    # Between its header and its pixels the file may have been replaced.
    if config.tiles is not None and seen != cut:
        raise BrokenSampleError(f"{picture.name}: its header tells another size than its pixels", "broken picture")
    return speaker.views(image, config, is_alone), seen


def _decoded(picture: Picture, speaker: Speaker) -> Image.Image:
    """In RGB."""
    with picture.open() as file:
        data = file.read(MAX_FILE_BYTES + 1)
    try:
        return decode_picture(picture.name, data, speaker.transparency).image
    except ImageError as error:
        raise BrokenSampleError(str(error), "broken picture") from None
