"""How a picture is cut into views, and which visual tokens come of them. Integers alone, no torch.

*Joined* tiles (LLaVA-NeXT, LLaVA-OneVision, arXiv 2408.03326): the thumbnail first, then the mosaic of all tiles line
by line, without the lines or columns that show padding, a learned newline behind each line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from skipvision.config import ModelConfig, TilesConfig

_TOLERATED = 1.1
"""How many times the side that max_tiles allows a mosaic may have before it is shrunk."""


@dataclass(frozen=True)
class Cut:
    """How one picture is cut."""

    height: int
    """Of the picture in pixels."""
    width: int
    rows: int = 0
    """Of tiles; 0 where the picture is seen once."""
    columns: int = 0

    @property
    def num_views(self) -> int:
        """Tiles, and the picture as a whole."""
        return self.rows * self.columns + 1


def cut_picture(config: ModelConfig, height: int, width: int, is_alone: bool = True) -> Cut:
    """The cut of a picture of this size in pixels; `is_alone` where no other picture is in the conversation.

    A strip so thin that nothing would be left of its mosaic is seen as a thumbnail alone.
    """
    tiles, side = config.tiles, config.vision.image_size
    whole = Cut(height, width)
    if tiles is None or not (is_alone or tiles.among_others):
        return whole
    if not tiles.is_joined:
        high, wide = scaled_sizes(tiles.longest_edge, side, height, width)[1]
        return whole if max(high, wide) <= side else Cut(height, width, high // side, wide // side)
    high, wide = best_size(tiles.sizes, height, width)
    cut = Cut(height, width, high // side, wide // side)
    return cut if all(_shown(config, tiles, cut)[2]) else whole


def best_size(sizes: tuple[tuple[int, int], ...], height: int, width: int) -> tuple[int, int]:
    """Height and width of the mosaic that keeps most of a picture, and of those the one with the least padding."""

    def fit(size: tuple[int, int]) -> tuple[int, int]:
        scale = min(size[1] / width, size[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - size[0] * size[1]

    return max(sizes, key=fit)


def scaled_sizes(longest_edge: int, side: int, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heights and widths that a picture is scaled to, one after the other: the second are multiples of `side`."""
    aspect = width / height
    if width >= height:
        first = _even(int(longest_edge / aspect)), longest_edge
    else:
        first = longest_edge, _even(int(longest_edge * aspect))
    height, width = (max(length, 1) for length in first)
    aspect = width / height
    if width >= height:
        second = _whole(int(_whole(width, side) / aspect), side), _whole(width, side)
    else:
        second = _whole(height, side), _whole(int(_whole(height, side) * aspect), side)
    return (height, width), second


def _even(length: int) -> int:
    return length + length % 2


def _whole(length: int, side: int) -> int:
    return math.ceil(length / side) * side


def token_counts(config: ModelConfig, cut: Cut) -> tuple[int, ...]:
    """Visual tokens of each run of rows that a picture becomes in the plain model."""
    if config.tiles is None or not config.tiles.is_joined:
        return (config.num_tokens,) * cut.num_views
    if not cut.rows:
        return (config.num_tokens + 1,)
    _, _, (lines, columns) = _shown(config, config.tiles, cut)
    return (config.num_tokens + lines * (columns + 1),)


def most_views(config: ModelConfig) -> int:
    """Of one picture."""
    tiles, side = config.tiles, config.vision.image_size
    if tiles is None:
        return 1
    if tiles.is_joined:
        return max(height // side * (width // side) for height, width in tiles.sizes) + 1
    lines = _whole(_even(tiles.longest_edge), side) // side
    return lines**2 + 1 if lines > 1 else 1


def most_tokens(config: ModelConfig) -> int:
    """Visual tokens of one picture in the plain model, at most."""
    tiles = config.tiles
    if tiles is None or not tiles.is_joined:
        return config.num_tokens * most_views(config)
    most, side = 0, config.vision.image_size
    for height, width in tiles.sizes:
        lines, columns = (length // side * config.vision.grid for length in (height, width))
        # What padding leaves of a mosaic: some lines fewer, or some columns.
        left = [(count, columns) for count in range(lines, 0, -2)] + [(lines, count) for count in range(columns, 0, -2)]
        most = max(most, *(shown[0] * (shown[1] + 1) for shown in (_shrunk(config, tiles, *each) for each in left)))
    return config.num_tokens + most


@dataclass(frozen=True)
class Mosaic:
    """The tokens of a joined picture, out of a table of all views' tokens, thumbnail first, and last the newline."""

    index: npt.NDArray[np.int64]
    """[K, N] rows of the table. K is 4 where mosaics may be shrunk, and 1 where not."""
    weight: npt.NDArray[np.float32]
    """[K, N] of their weighted sum."""


def mosaic(config: ModelConfig, cut: Cut) -> Mosaic:
    """Where each token of a joined picture comes from."""
    assert config.tiles is not None
    count, side = config.num_tokens, config.vision.grid
    newline = count * cut.num_views
    if not cut.rows:
        index = np.array([[*range(count), newline]])
        return _widened(config.tiles, index, np.ones(index.shape))
    (top, left), (height, width), shape = _shown(config, config.tiles, cut)
    lines, line_shares = _sampled(height, shape[0])
    columns, column_shares = _sampled(width, shape[1])
    grid = np.arange(cut.rows * side)[:, None], np.arange(cut.columns * side)[None]
    views = 1 + grid[0] // side * cut.columns + grid[1] // side
    places = views * count + grid[0] % side * side + grid[1] % side
    indices: list[npt.NDArray[np.int64]] = []
    weights: list[npt.NDArray[np.float64]] = []
    for line, line_share in zip(lines, line_shares, strict=True):
        for column, column_share in zip(columns, column_shares, strict=True):
            taken = places[np.ix_(top + line, left + column)]
            share = line_share[:, None] * column_share
            is_first = not indices
            ends = np.full((len(taken), 1), newline)
            indices.append(np.hstack([taken, ends]).ravel())
            weights.append(np.hstack([share, np.full(ends.shape, float(is_first))]).ravel())
    base = np.tile(np.arange(count), (len(indices), 1))
    base_weight = np.zeros(base.shape)
    base_weight[0] = 1
    return _widened(config.tiles, np.hstack([base, indices]), np.hstack([base_weight, weights]))


def _widened(tiles: TilesConfig, index: npt.NDArray[np.int64], weight: npt.NDArray[np.float64]) -> Mosaic:
    """With as many rows as every picture of the model has: where nothing is shrunk, one carries all the weight."""
    rows = 4 if tiles.max_tiles else 1
    if len(index) < rows:
        index = np.tile(index, (rows, 1))
        weight = np.vstack([weight, np.zeros((rows - 1, weight.shape[1]))])
    return Mosaic(np.ascontiguousarray(index, np.int64), np.ascontiguousarray(weight, np.float32))


def _shown(
    config: ModelConfig, tiles: TilesConfig, cut: Cut
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Of the mosaic's grid of patches: first line and column without padding, lines and columns, and to how many of
    both they are shrunk."""
    side = config.vision.grid
    lines, columns = cut.rows * side, cut.columns * side
    top = left = 0
    if cut.width / cut.height > columns / lines:
        top = (lines - int(round(cut.height * (columns / cut.width), 7))) // 2
    else:
        left = (columns - int(round(cut.width * (lines / cut.height), 7))) // 2
    lines, columns = lines - 2 * top, columns - 2 * left
    return (top, left), (lines, columns), _shrunk(config, tiles, lines, columns)


def _shrunk(config: ModelConfig, tiles: TilesConfig, lines: int, columns: int) -> tuple[int, int]:
    """To how many lines and columns of tokens a mosaic of so many is shrunk."""
    if not tiles.max_tiles:
        return lines, columns
    ratio = math.sqrt(lines * columns / (tiles.max_tiles * config.num_tokens))
    return (int(lines // ratio), int(columns // ratio)) if ratio > _TOLERATED else (lines, columns)


def _sampled(length: int, count: int) -> tuple[list[npt.NDArray[np.int64]], list[npt.NDArray[np.float64]]]:
    """Neighbours and their shares where `length` lines are read at `count` places, evenly and linearly between them."""
    if count == length:
        return [np.arange(length)], [np.ones(length)]
    places = np.maximum((np.arange(count) + 0.5) * (length / count) - 0.5, 0)
    before = places.astype(np.int64)
    share = places - before
    return [before, np.minimum(before + 1, length - 1)], [1 - share, share]
