"""A prompt as the inputs of `prefill`. Imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from skipvision.layout import FOREVER, Ints, TokenLayout
from svcli_export.contract import Contract


def prompt_feeds(layout: TokenLayout, write_index: int = 0, next_position: int = 0) -> dict[str, Ints]:
    """All but ids, visual rows and caches, by name; not every model takes each.

    The rows go behind `write_index` rows of the cache, and the first of them stands at `next_position`.
    """
    until = layout.visible_until
    return {
        "source": layout.source[None],
        "position_ids": layout.positions[None] + next_position,
        "visible_until": np.where(until == FOREVER, FOREVER, until + next_position)[None],
        "kept_index": np.arange(layout.num_kept, dtype=np.int64)[None],
        "write_index": np.array([write_index], np.int64),
    }


def no_visual(contract: Contract) -> npt.NDArray[Any]:
    """The visual rows of a prompt without pictures."""
    (visual,) = (tensor for tensor in contract.graph("prefill").inputs if tensor.name == "visual")
    return np.zeros([each if isinstance(each, int) else 0 for each in visual.shape], visual.dtype)
