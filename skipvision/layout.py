"""Which position is text, retained, summary or skipped: the heart of Skip-Vision, in plain integers. No torch.

One sequence is a list of segments. In *attention order* (what defines position ids and causality)
an image is `[retained][summary 1][skipped][summary 2]`. In *memory order* all skipped rows of the sequence stand
last, while position ids keep the attention order. So the FFN stream and the rows that survive in the KV cache are
one plain slice, `[:num_kept]`, in every layer, and nothing is gathered or scattered inside a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from skipvision.config import ModelConfig, Visibility
from skipvision.tiles import Cut, most_tokens, most_views, token_counts

Ints = npt.NDArray[np.int64]

TEXT, RETAINED, SUMMARY, SKIPPED = range(4)
FOREVER = np.iinfo(np.int32).max
"""`visible_until` of a row that every later row may attend to."""


@dataclass(frozen=True)
class ImageSpan:
    """One run of visual rows: a picture, or one of the views that it is cut into."""

    num_retained: int
    num_skipped: int = 0
    num_summary: int = 0
    """2 where tokens are skipped, 1 where the rest was dropped outright, 0 in the plain model."""
    num_tokens: int = field(default=0, compare=False)
    """Visual tokens of the plain model that it stands for, where that is known."""
    num_views: int = field(default=1, compare=False)
    """Pictures that the encoder sees for it."""

    @property
    def length(self) -> int:
        return self.num_retained + self.num_skipped + self.num_summary

    @property
    def num_kept(self) -> int:
        """Rows that pass the FFN and stay in the KV cache."""
        return self.num_retained + self.num_summary

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """Kind of each row, in attention order."""
        first, last = min(self.num_summary, 1), max(self.num_summary - 1, 0)
        groups = [(RETAINED, self.num_retained), (SUMMARY, first), (SKIPPED, self.num_skipped), (SUMMARY, last)]
        return tuple(kind for kind, count in groups for _ in range(count))

    @staticmethod
    def of(config: ModelConfig, num_tokens: int | None = None, num_views: int = 1) -> ImageSpan:
        """Of `num_tokens` visual tokens, or else of those of one view."""
        num_tokens = config.num_tokens if num_tokens is None else num_tokens
        if config.skip is None:
            return ImageSpan(num_tokens, num_tokens=num_tokens, num_views=num_views)
        num_skipped = min(config.skip.num_skipped, num_tokens - config.skip.num_retained)
        return ImageSpan(config.skip.num_retained, num_skipped, 2 if num_skipped else 1, num_tokens, num_views)


def picture_spans(config: ModelConfig, cut: Cut) -> tuple[ImageSpan, ...]:
    """The runs of rows of one picture, each of which has a placeholder id of its own."""
    counts = token_counts(config, cut)
    return tuple(ImageSpan.of(config, count, cut.num_views // len(counts)) for count in counts)


def largest_spans(config: ModelConfig) -> tuple[ImageSpan, ...]:
    """Of the picture with the most tokens."""
    if config.tiles is not None and config.tiles.is_joined:
        return (ImageSpan.of(config, most_tokens(config), most_views(config)),)
    return (ImageSpan.of(config),) * most_views(config)


Segment = int | ImageSpan
"""A run of text rows, or an image."""


@dataclass(frozen=True)
class TokenLayout:
    """Where every row of one sequence stands.

    `source` refers to a table of `num_ids` text embeddings (one per input id, the image placeholders included but
    never read) followed by the visual rows of all images.
    """

    segments: tuple[Segment, ...]
    visibility: Visibility = "image"
    picked: tuple[int, ...] | None = None
    """Which of the visual rows that are given stand here, in attention order; None: all of them."""

    def __post_init__(self) -> None:
        """Raises ValueError where `picked` are not as many as there are visual rows."""
        if self.picked is not None and len(self.picked) != self.num_visual:
            raise ValueError(f"{len(self.picked)} rows are picked for {self.num_visual} visual rows")

    @staticmethod
    def of(
        input_ids: Sequence[int], image_token_id: int, config: ModelConfig, spans: Sequence[ImageSpan] | None = None
    ) -> TokenLayout:
        """The layout of ids in which each run of visual rows is one placeholder id.

        `spans` are those runs in order; or else each is one view. Raises ValueError where there are not as many.
        """
        num_spans = sum(token == image_token_id for token in input_ids)
        taken = iter([ImageSpan.of(config)] * num_spans if spans is None else spans)
        if spans is not None and len(spans) != num_spans:
            raise ValueError(f"{num_spans} placeholders for {len(spans)} runs of visual rows")
        segments: list[Segment] = []
        for token in input_ids:
            if token == image_token_id:
                segments.append(next(taken))
            elif segments and isinstance(segments[-1], int):
                segments[-1] += 1
            else:
                segments.append(1)
        return TokenLayout(tuple(segments), "image" if config.skip is None else config.skip.visibility)

    @cached_property
    def images(self) -> tuple[ImageSpan, ...]:
        return tuple(segment for segment in self.segments if isinstance(segment, ImageSpan))

    @cached_property
    def num_ids(self) -> int:
        return sum(segment if isinstance(segment, int) else 1 for segment in self.segments)

    @cached_property
    def length(self) -> int:
        """Rows in attention order; the position of the first generated token."""
        return sum(segment if isinstance(segment, int) else segment.length for segment in self.segments)

    @cached_property
    def kinds(self) -> Ints:
        """[L] kind of each row, in attention order."""
        runs = [[TEXT] * segment if isinstance(segment, int) else segment.kinds for segment in self.segments]
        return np.array([kind for run in runs for kind in run], dtype=np.int64)

    @property
    def num_visual(self) -> int:
        return sum(image.length for image in self.images)

    @property
    def num_skipped(self) -> int:
        return sum(image.num_skipped for image in self.images)

    @property
    def num_kept(self) -> int:
        """Rows in the FFN stream, and in the KV cache after prefill."""
        return self.length - self.num_skipped

    @cached_property
    def positions(self) -> Ints:
        """[L] position id of each row in memory order: a permutation of arange(L), kept rows first."""
        skipped = self.kinds == SKIPPED
        return np.concatenate([np.flatnonzero(~skipped), np.flatnonzero(skipped)]).astype(np.int64)

    @cached_property
    def source(self) -> Ints:
        """[L] row of the table (text embeddings, then visual rows) for each row in memory order."""
        table: list[Ints] = []
        next_id, next_visual = 0, self.num_ids
        for segment in self.segments:
            if isinstance(segment, int):
                table.append(np.arange(next_id, next_id + segment))
                next_id += segment
            else:
                table.append(np.arange(next_visual, next_visual + segment.length))
                next_id += 1
                next_visual += segment.length
        attention_order = np.concatenate(table).astype(np.int64) if table else np.zeros(0, dtype=np.int64)
        if self.picked is not None:
            attention_order[self.kinds != TEXT] = self.num_ids + np.array(self.picked, dtype=np.int64)
        return attention_order[self.positions]

    @cached_property
    def visible_until(self) -> Ints:
        """[L] last position that may attend to each row, in memory order.

        Row k is attended to by row q where `position[k] <= position[q] <= visible_until[k]`.
        """
        until = np.full(self.length, FOREVER, dtype=np.int64)
        start = 0
        for segment in self.segments:
            length = segment if isinstance(segment, int) else segment.length
            if isinstance(segment, ImageSpan) and self.visibility == "image":
                rows = np.arange(start, start + length)
                until[rows[self.kinds[rows] == SKIPPED]] = start + length - 1
            start += length
        return until[self.positions]


def read_ids(input_ids: Sequence[int], vocab_size: int) -> list[int]:
    """Ids whose embeddings can be looked up: a placeholder may lie behind the vocabulary, and nothing reads its row."""
    return [token if token < vocab_size else 0 for token in input_ids]


@dataclass(frozen=True)
class BatchLayout:
    """Several layouts side by side, the kept part and the skipped part padded apart.

    All arrays are [B, num_kept + num_skipped], in memory order. Padding is never attended to.
    """

    source: Ints
    """Row of the table (B * T text embeddings, then the visual rows of all images of the batch)."""
    positions: Ints
    visible_until: Ints
    num_kept: int
    """Width of the kept part: the FFN takes `[:, :num_kept]`."""
    kept_lengths: Ints
    """[B] rows that are really kept."""
    next_positions: Ints
    """[B] position of the first generated token."""

    @staticmethod
    def of(layouts: Sequence[TokenLayout], ids_width: int) -> BatchLayout:
        """`ids_width`: T, the width of the padded [B, T] input ids."""
        num_kept = max(layout.num_kept for layout in layouts)
        width = num_kept + max(layout.num_skipped for layout in layouts)
        source = np.zeros((len(layouts), width), dtype=np.int64)
        # A padding row attends to every real row, so that its softmax is finite; nothing reads its result.
        positions = np.full((len(layouts), width), max(layout.length for layout in layouts), dtype=np.int64)
        visible_until = np.full((len(layouts), width), -1, dtype=np.int64)
        next_visual = len(layouts) * ids_width
        for row, layout in enumerate(layouts):
            columns = np.r_[: layout.num_kept, num_kept : num_kept + layout.num_skipped]
            visual = layout.source >= layout.num_ids
            source[row, columns] = np.where(
                visual, layout.source - layout.num_ids + next_visual, layout.source + row * ids_width
            )
            positions[row, columns] = layout.positions
            visible_until[row, columns] = layout.visible_until
            next_visual += sum(image.length for image in layout.images)
        return BatchLayout(
            source=source,
            positions=positions,
            visible_until=visible_until,
            num_kept=num_kept,
            kept_lengths=np.array([layout.num_kept for layout in layouts], dtype=np.int64),
            next_positions=np.array([layout.length for layout in layouts], dtype=np.int64),
        )
