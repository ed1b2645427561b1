"""Several questions about one picture in one training sequence: each sees the picture and itself, not the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skipvision.layout import TokenLayout
from skipvision.model import attention_mask
from skipvision.training.speaker import IGNORE


@dataclass(frozen=True)
class PackedText:
    """The text rows of B sequences; padding is in block 0 and attended to by padding alone."""

    input_ids: Tensor
    """[B, T]."""
    labels: Tensor
    """[B, T]: the id that each row must predict, IGNORE where there is none."""
    offsets: Tensor
    """[B, T]: place of the row in its own block."""
    blocks: Tensor
    """[B, T]: number of the block from 1 on."""


def pack(rows: Sequence[Sequence[tuple[list[int], list[int]]]], width: int) -> PackedText:
    """`rows`: per picture its blocks, each (ids, labels) of equal length; together at most `width`."""
    shape = (len(rows), width)
    input_ids, offsets, blocks = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    labels = torch.full(shape, IGNORE)
    for row, sequence in enumerate(rows):
        start = 0
        for number, (ids, targets) in enumerate(sequence, start=1):
            span = slice(start, start + len(ids))
            input_ids[row, span] = torch.tensor(ids)
            labels[row, span] = torch.tensor(targets)
            offsets[row, span] = torch.arange(len(ids))
            blocks[row, span] = number
            start += len(ids)
    return PackedText(input_ids, labels, offsets, blocks)


def packed_inputs(layout: TokenLayout, text: PackedText) -> tuple[Tensor, Tensor, Tensor, int]:
    """How packed text joins the picture rows of `layout` (images only), in memory order.

    Returns the source index [B, L] into the table of B*T text rows and then the visual rows, position ids [B, L],
    the mask [B, 1, L, L] and the number of kept rows. A block's positions go on from the picture's end.
    """
    batch, width = text.input_ids.shape
    num_visual = sum(image.length for image in layout.images)
    kept = layout.num_kept

    def join(picture: Tensor, rows: Tensor) -> Tensor:
        picture = picture.expand(batch, -1) if picture.dim() == 1 else picture
        return torch.cat([picture[:, :kept], rows, picture[:, kept:]], 1)

    visual_source = torch.from_numpy(layout.source) - layout.num_ids + batch * width
    visual_source = visual_source + torch.arange(batch)[:, None] * num_visual
    source = join(visual_source, torch.arange(batch * width).view(batch, width))
    positions = join(torch.from_numpy(layout.positions), layout.length + text.offsets)
    # No row is visible behind the end of its own block; padding, which is last, is a block too.
    places = torch.arange(width).expand(batch, -1)
    ends = torch.where(text.blocks[:, :, None] == text.blocks[:, None], places[:, None], 0).amax(-1)
    order = join(torch.from_numpy(layout.positions), layout.length + places)
    until = join(torch.from_numpy(layout.visible_until), layout.length + ends)
    return source, positions, attention_mask(order, until), kept + width
