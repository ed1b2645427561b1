"""Samples side by side in one tensor, and several of them in one sequence, none of which sees another.

A sequence of several samples is one long `TokenLayout`: kept rows of all samples first, skipped rows of all last. The
two-vector rule of `layout.py` keeps them apart, since no row is visible behind the end of its own sample. Only what
RoPE reads begins anew in each.

Shapes: B sequences, T ids, L rows, V views of all pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from skipvision.config import ModelConfig
from skipvision.layout import BatchLayout, Ints, TokenLayout
from skipvision.tiles import Cut
from skipvision.training.conversation import Broken
from skipvision.training.samples import Sample
from skipvision.training.speaker import IGNORE
from skipvision.training.task import Counts


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Where nothing is left to show one row stands there that has nothing to say, so that processes that
    wait for one another do the same."""

    input_ids: Tensor
    """[B, T]."""
    labels: Tensor
    """[B, num_kept]: what each kept row must say next, else IGNORE."""
    pixels: Tensor
    """[V, 3, S, S] of all pictures, in order."""
    cuts: tuple[Cut, ...]
    """Of each picture."""
    source: Tensor
    """[B, L], in memory order: row of the table of B*T text embeddings and then all visual rows."""
    order: Tensor
    """[B, L]: place in the sequence in attention order."""
    visible_until: Tensor
    """[B, L]: last place that may attend to each row. Padding attends to padding alone."""
    positions: Tensor
    """[B, L]: place in the row's own sample."""
    num_kept: int
    """The FFN takes `[:, :num_kept]`."""
    is_causal: bool
    """Each real row looks at all rows before it in memory order, as in a plain model: a mask would say nothing more."""
    counts: Counts
    names: tuple[str, ...]
    broken: tuple[Broken, ...] = ()


def collate(sequences: Sequence[Sequence[Sample]], config: ModelConfig, broken: Sequence[Broken] = ()) -> Batch:
    """Sequences without a sample are left out."""
    sequences = [samples for samples in sequences if samples]
    samples = list(chain.from_iterable(sequences))
    ids = [[*chain.from_iterable(sample.spoken.ids for sample in each)] for each in sequences] or [[0]]
    layouts = [_joined([sample.layout for sample in each]) for each in sequences] or [TokenLayout((1,))]
    width = max(map(len, ids))
    batch = BatchLayout.of(layouts, width)
    starts = [[sample.layout.length for sample in each] for each in sequences] or [[1]]
    positions, visible_until = _apart(batch, starts)
    labels = np.full((len(ids), batch.num_kept), IGNORE, dtype=np.int64)
    for row, (layout, each) in enumerate(zip(layouts, sequences, strict=False)):
        said = np.array([label for sample in each for label in row_labels(sample)], dtype=np.int64)
        labels[row, : layout.num_kept] = said[layout.positions[: layout.num_kept]]
    side = config.vision.image_size
    views = [view for sample in samples for view in sample.views]
    pixels = [np.zeros((0, 3, side, side), np.float32), *(pixels for pixels, _ in views)]
    spans = [span for sample in samples for span in sample.layout.images]
    return Batch(
        input_ids=torch.tensor([[*each, *[0] * (width - len(each))] for each in ids]),
        labels=torch.from_numpy(labels),
        pixels=torch.from_numpy(np.concatenate(pixels).astype(np.float32, copy=False)),
        cuts=tuple(cut for _, cut in views),
        source=torch.from_numpy(batch.source),
        order=torch.from_numpy(batch.positions),
        visible_until=torch.from_numpy(visible_until),
        positions=torch.from_numpy(positions),
        num_kept=batch.num_kept,
        # Padding, which is last, then looks at real rows: what comes of that is read by nothing.
        is_causal=batch.num_kept == batch.source.shape[1] and all(len(each) == 1 for each in starts),
        counts=Counts(
            samples=len(samples),
            rows=sum(sample.layout.length for sample in samples),
            answer_tokens=int((labels != IGNORE).sum()),
            visual_rows=sum(span.length for span in spans),
            visual_kept=sum(span.num_kept for span in spans),
            visual_plain=sum(span.num_tokens for span in spans),
        ),
        names=tuple(sample.name for sample in samples),
        broken=tuple(broken),
    )


def row_labels(sample: Sample) -> list[int]:
    """Of each row in attention order; what a placeholder says next, the last row says of those that it stands for."""
    labels = iter(sample.spoken.labels)
    rows: list[int] = []
    for segment in sample.layout.segments:
        if isinstance(segment, int):
            rows += [next(labels) for _ in range(segment)]
        else:
            rows += [IGNORE] * (segment.length - 1) + [next(labels)]
    return rows


def _joined(layouts: Sequence[TokenLayout]) -> TokenLayout:
    """One behind the other, as if they saw each other."""
    return replace(layouts[0], segments=tuple(chain.from_iterable(layout.segments for layout in layouts)))


def _apart(batch: BatchLayout, lengths: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    """Positions that begin anew in each sample, and `visible_until` that ends with it; `lengths` of each sequence's
    samples."""
    is_padding = batch.visible_until < 0
    positions = batch.positions.copy()
    until = np.where(is_padding, batch.positions, batch.visible_until)
    for row, each in enumerate(lengths):
        ends = np.cumsum(each)
        real = ~is_padding[row]
        sample = np.searchsorted(ends, positions[row, real], side="right")
        until[row, real] = np.minimum(until[row, real], ends[sample] - 1)
        positions[row, real] -= (ends - each)[sample]
    return positions, until
