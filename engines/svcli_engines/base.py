"""What every engine can do: token ids in, logits out. The loop around it is in generate.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from skipvision.layout import TokenLayout
from skipvision.tiles import Cut

Pixels = npt.NDArray[np.float32]
Visual = npt.NDArray[Any]
Logits = npt.NDArray[np.float32]


class EngineError(ValueError):
    """An engine asked for what it cannot do."""


class MachineError(EngineError):
    """What this machine lacks; one sentence with what mends it."""


class Engine(Protocol):
    """One sequence at a time. The cache starts empty, `prefill` fills it, `extend` goes on behind it."""

    name: str
    """Such as `onnxruntime-cpu`."""
    precision: str
    load_seconds: float
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

    def encode(self, pixels: Pixels, cut: Cut | None = None) -> Visual:
        """Visual rows [I, V, D] of `pixels` [I, 3, H, W]: pictures that are seen once, or the views of one.

        Where views are joined, `cut` says how, and the rows are [1, V, D].
        """

    def prefill(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        """Logits [vocab] of the last row; `visual` has the rows of all pictures, as `together` puts them.

        Whatever was in the cache is gone. Raises EngineError where the kept rows of `layout` exceed `capacity`.
        """

    def extend(self, input_ids: Sequence[int]) -> Logits:
        """Logits [vocab] of the last of one or more new ids behind the cache.

        Raises EngineError for an empty cache, no ids, or more than fit.
        """

    def reset(self) -> None:
        """Empties the cache."""

    def close(self) -> None:
        """Frees what the engine holds; it cannot be used afterwards."""


def together(pictures: Sequence[Visual]) -> Visual | None:
    """The rows of several pictures, each as `encode` gave them; None of no picture.

    Runs of one length stand side by side [I, V, D]; others follow one another [1, n, D].
    """
    if not pictures:
        return None
    if len({each.shape[1] for each in pictures}) == 1:
        return np.concatenate(pictures)
    return np.concatenate([each.reshape(1, -1, each.shape[-1]) for each in pictures], axis=1)


def check_prefill(layout: TokenLayout, visual: Visual | None, capacity: int) -> None:
    """Raises EngineError where `layout` does not fit the cache or the pictures given."""
    given = 0 if visual is None else visual.shape[0] * visual.shape[1]
    wanted = sum(image.length for image in layout.images)
    if given != wanted:
        raise EngineError(f"the prompt has pictures of {wanted} rows and {given} rows were given")
    if not 0 < layout.num_kept <= capacity:
        raise EngineError(f"a prompt of {layout.num_kept} rows does not fit a KV cache of {capacity}")


def check_extend(num_new: int, length: int, capacity: int) -> None:
    """Raises EngineError where `num_new` ids cannot go behind `length` rows."""
    if length == 0:
        raise EngineError("nothing to extend: prefill first")
    if not 0 < num_new <= capacity - length:
        raise EngineError(f"{num_new} new rows do not fit behind {length} in a KV cache of {capacity}")
