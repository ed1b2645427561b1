"""What every engine can do: token ids in, logits out. The loop around it is in generate.py."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from skipvision.layout import Ints, TokenLayout
from skipvision.tiles import Cut

Pixels = npt.NDArray[np.float32]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Visual:
    """What the decoder is shown of one or more pictures."""

    rows: npt.NDArray[Any]
    """[I, V, D], in attention order; where views are joined [1, V, D]."""
    retained: Ints | None = None
    """[I, R] which tokens were retained, in raster order; None where nothing was selected or the engine cannot tell."""

    @property
    def num_bytes(self) -> int:
        return int(self.rows.nbytes) + (0 if self.retained is None else int(self.retained.nbytes))


class EngineError(ValueError):
    """An engine asked for what it cannot do."""


class MachineError(EngineError):
    """What this machine lacks; one sentence with what mends it."""


class Engine(Protocol):
    """One sequence. The cache starts empty, `prefill` fills it, `append` and `extend` go on behind it."""

    name: str
    """Such as `onnxruntime-cpu`."""
    precision: str
    can_append: bool
    """Whether `append` is there; or else pictures go with the first prompt alone."""

    @property
    def load_seconds(self) -> float:
        """Spent so far on opening what was needed."""

    @property
    def capacity(self) -> int:
        """Rows that the KV cache holds."""

    @property
    def kv_bytes_per_row(self) -> int:
        """K and V of one row, all layers."""

    @property
    def length(self) -> int:
        """Rows in the cache."""

    @property
    def next_position(self) -> int:
        """Position id of the next row; larger than `length` where rows were skipped, since they keep theirs."""

    def encode(self, pixels: Pixels, cut: Cut | None = None) -> Visual:
        """Visual rows of `pixels` [I, 3, H, W]: pictures that are seen once, or the views of one.

        Where views are joined, `cut` says how. Raises EngineError where the engine cannot see pictures so.
        """

    def prefill(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        """Logits [vocab] of the last row; `visual` has the rows of all pictures, as `together` puts them.

        Whatever was in the cache is gone. Raises EngineError where the kept rows of `layout` exceed `capacity`.
        """

    def append(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        """`prefill` behind the rows that are in the cache, which the new rows attend to; `layout` is of the new alone.

        Raises EngineError where they do not fit behind it, or where not `can_append` and the cache is not empty.
        """

    def extend(self, input_ids: Sequence[int]) -> Logits:
        """Logits [vocab] of the last of one or more new ids behind the cache.

        Raises EngineError for an empty cache, no ids, or more than fit.
        """

    def rewind(self, num_rows: int, next_position: int) -> None:
        """Keeps the first `num_rows` of the cache; the next row behind them stands at `next_position`.

        Raises EngineError for more rows than there are.
        """

    def reset(self) -> None:
        """Empties the cache."""

    def close(self) -> None:
        """Frees what the engine holds; it cannot be used afterwards."""


class Pool(Protocol):
    """Several sequences of one model side by side, such as those of a server's callers."""

    @property
    def slots(self) -> Sequence[Engine]:
        """Each has a KV cache of its own, of `capacity` rows; whatever else there is of the model, they share."""

    def step(self, new_ids: Mapping[int, int]) -> dict[int, Logits]:
        """`extend` by one id in each of some slots, by number: one run of the graph where the engine can.

        Logits [vocab] of each. Raises EngineError as `extend` does, and then no slot has changed.
        """

    def width(self, numbers: Collection[int]) -> int:
        """Sequences that `step` computes for these slots, idle ones among them."""

    def close(self) -> None:
        """Frees what all slots hold."""


def together(pictures: Sequence[Visual]) -> Visual | None:
    """The rows of several pictures, each as `encode` gave them; None of no picture.

    Runs of one length stand side by side [I, V, D]; others follow one another [1, n, D].
    """
    if not pictures:
        return None
    rows = [each.rows for each in pictures]
    if len({each.shape[1] for each in rows}) == 1:
        return Visual(np.concatenate(rows))
    return Visual(np.concatenate([each.reshape(1, -1, each.shape[-1]) for each in rows], axis=1))


def check_prefill(layout: TokenLayout, visual: Visual | None, capacity: int, length: int = 0) -> None:
    """Raises EngineError where `layout` does not fit behind `length` rows of the cache, or the pictures given."""
    given = 0 if visual is None else visual.rows.shape[0] * visual.rows.shape[1]
    wanted = layout.num_visual if layout.picked is None else max(layout.picked, default=-1) + 1
    if given < wanted or (layout.picked is None and given != wanted):
        raise EngineError(f"the prompt has pictures of {wanted} rows and {given} rows were given")
    if not 0 < layout.num_kept <= capacity - length:
        behind = f" behind {length}" if length else ""
        raise EngineError(f"a prompt of {layout.num_kept} rows does not fit{behind} in a KV cache of {capacity}")


def check_positions(end: int, max_positions: int) -> None:
    """Raises EngineError where rows would stand at positions up to `end`, which a bundle does not have."""
    if end > max_positions:
        raise EngineError(f"rows up to position {end} do not fit {max_positions} positions")


def check_rewind(num_rows: int, length: int) -> None:
    """Raises EngineError where the cache of `length` rows does not hold `num_rows`."""
    if not 0 <= num_rows <= length:
        raise EngineError(f"the KV cache holds {length} rows, not {num_rows}")


def check_extend(num_new: int, length: int, capacity: int) -> None:
    """Raises EngineError where `num_new` ids cannot go behind `length` rows."""
    if length == 0:
        raise EngineError("nothing to extend: prefill first")
    if not 0 < num_new <= capacity - length:
        raise EngineError(f"{num_new} new rows do not fit behind {length} in a KV cache of {capacity}")
