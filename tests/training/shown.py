"""Samples for tiny models of every kind, and what each costs when it is shown alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from skipvision.config import ModelConfig
from skipvision.layout import BatchLayout, ImageSpan, TokenLayout, picture_spans
from skipvision.model import SkipVisionModel
from skipvision.tiles import cut_picture
from skipvision.training.samples import Sample
from skipvision.training.speaker import IGNORE, Spoken

Part = int | tuple[int, int]
"""An id, which is negative where the row before it must say it; or the height and width of a picture."""


def sample_of(name: str, parts: Sequence[Part], config: ModelConfig, image_id: int) -> Sample:
    """Pixels are random, another picture for each name and place."""
    sizes = [part for part in parts if isinstance(part, tuple)]
    cuts = iter([cut_picture(config, *size, is_alone=len(sizes) == 1) for size in sizes])
    ids: list[int] = []
    labels: list[int] = []
    spans: list[ImageSpan] = []
    views = []
    side = config.vision.image_size
    for part in parts:
        if isinstance(part, tuple):
            cut = next(cuts)
            runs = picture_spans(config, cut)
            ids += [image_id] * len(runs)
            labels += [IGNORE] * len(runs)
            spans += runs
            rng = np.random.default_rng([*name.encode(), len(ids)])
            views.append((rng.standard_normal((cut.num_views, 3, side, side)).astype(np.float32), cut))
        else:
            if part < 0:
                labels[-1] = -part
            ids.append(abs(part))
            labels.append(IGNORE)
    return Sample(name, Spoken(ids, labels), TokenLayout.of(ids, image_id, config, spans), tuple(views))


def loss_alone(model: SkipVisionModel, sample: Sample) -> Tensor:
    """Summed over its labels, by the road that inference takes: one sequence, one picture at a time."""
    dtype = model.decoder.embed.weight.dtype
    rows = [model.encode_picture(torch.from_numpy(view).to(dtype), cut).flatten(0, 1) for view, cut in sample.views]
    visual = torch.cat([*rows, torch.zeros(0, model.config.text.hidden_size, dtype=dtype)])[None]
    ids = sample.spoken.ids
    batch = BatchLayout.of([sample.layout], len(ids))
    logits = model(torch.tensor([ids]), visual, batch)[0]
    columns = {int(position): column for column, position in enumerate(batch.positions[0, : batch.num_kept])}
    total, end, spans = torch.zeros((), dtype=dtype), -1, iter(sample.layout.images)
    is_text = [row_is_text for segment in sample.layout.segments for row_is_text in _is_text(segment)]
    for text, label in zip(is_text, sample.spoken.labels, strict=True):
        end += 1 if text else next(spans).length
        if label != IGNORE:
            total = total + F.cross_entropy(logits[columns[end]], torch.tensor(label))
    return total


def _is_text(segment: int | ImageSpan) -> list[bool]:
    return [True] * segment if isinstance(segment, int) else [False]
