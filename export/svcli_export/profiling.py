"""Skip-Vision's motivation measured on pictures: from a model that is read to a profile of each picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from skipvision.config import SkipConfig
from skipvision.layout import read_ids
from skipvision.presets import Setting
from skipvision.profile import Profile, ProfileError, Sample, Spread, measure
from svcli_export.chat import ChatTokenizer
from svcli_export.samples import sample_of, setting_of
from svcli_export.source import Source

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
    asked: Setting | tuple[int, int] | None = None,
    progress: Progress = lambda _done, _total: None,
) -> Measurement:
    """Profiles the model once for each RGB picture, with the same question.

    `asked` is a setting of the paper's, or retained and skipped tokens; without either a model is measured as it was
    trained. A plain model gets a summary layer that takes means.

    Raises ProfileError for a plain model of which nothing is asked, ConfigError for a setting that does not fit,
    SourceError for a bundle without the layers that it needs, SampleError for a template that shows no pictures.
    """
    trained = source.model.config.skip
    skip = setting_of(source.model.config, asked)
    if not isinstance(skip, SkipConfig):
        raise ProfileError("this model does not skip; name a setting by --skip, such as --skip 64/64, or by --preset")
    model = (source.model if skip == trained else source.model.with_skip(skip)).float()
    source.check(model.config)
    tokenizer = ChatTokenizer(source.tokenizer, source.chat.template, source.chat.published)

    def samples() -> Iterator[Sample]:
        for picture in pictures:
            sample = sample_of(picture, question, model.config, tokenizer, source.image, source.chat)
            with torch.no_grad():
                # The random selector draws the same for every picture, and in every run.
                drawn = torch.Generator().manual_seed(0)
                visual = model.encode_picture(torch.from_numpy(sample.pixels), sample.cut, drawn)
            ids = read_ids(sample.prompt, model.config.text.vocab_size)
            yield Sample(ids, visual, sample.layout)

    profiles = []
    progress(0, len(pictures))
    for profile in measure(model, samples()):
        profiles.append(profile)
        progress(len(profiles), len(pictures))
    return Measurement(skip, skip == trained and model.config.skip_trained, tuple(profiles))
