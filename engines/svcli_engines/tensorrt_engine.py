"""A bundle's plans in TensorRT or TensorRT-RTX, as one sequence or a pool of them.

Imports neither torch nor TensorRT; making an engine imports the latter, and cuda-python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from skipvision.layout import FOREVER, Ints, TokenLayout
from skipvision.tiles import Cut
from svcli_engines.base import EngineError, Logits, Pixels, Visual
from svcli_engines.cuda import CudaRuntime
from svcli_engines.plans import Backend
from svcli_engines.slots import Slot, SlotPool
from svcli_engines.tensorrt_phases import Array, OpenPlans
from svcli_export.contract import CachePart, past_name
from svcli_export.feeds import prompt_feeds
from svcli_export.manifest import Manifest


class TensorRTSlot(Slot):
    """One sequence of a pool."""

    def __init__(self, plans: OpenPlans, number: int, load_seconds: float) -> None:
        super().__init__(plans.contract.capacity, plans.contract.max_positions)
        self.name, self.precision, self.can_append = plans.name, plans.precision, plans.can_append
        self.load_seconds = load_seconds
        self._plans, self._contract, self._place = plans, plans.contract, range(number, number + 1)

    @property
    def kv_bytes_per_row(self) -> int:
        return self._contract.kv_bytes_per_row

    def encode(self, pixels: Pixels, cut: Cut | None = None) -> Visual:
        if cut is not None and cut.rows:
            raise EngineError("plans for pictures in tiles are not there yet")
        most = self._plans.largest("vision", "pixels")[0]
        parts = [pixels[first : first + most] for first in range(0, len(pixels), most)]
        names = self._contract.graph("vision").output_names
        runs = [self._plans.run("vision", {"pixels": part}, names, len(part)) for part in parts]
        return Visual(*(np.concatenate(outputs) for outputs in zip(*runs, strict=True)))

    def append(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        if self._length and not self.can_append:
            held = f"{self._length} rows are in the cache"
            raise EngineError(f"a prefill plan of its own takes pictures with the first prompt alone, and {held}")
        return super().append(input_ids, visual, layout)

    def cache_rows(self, layer: int, part: CachePart) -> npt.NDArray[np.float32]:
        """A copy [G, length, d] of the rows in use of one layer's K or V."""
        rows = self._plans.cache(past_name(layer, part), self._place.start)
        used: npt.NDArray[np.float32] = rows[:, : self._length].astype(np.float32)
        return used

    def _write_prompt(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        feeds: dict[str, Array] = {
            "input_ids": np.array([input_ids], np.int64),
            **prompt_feeds(layout, self._length, self._next_position),
        }
        if visual is not None and len(visual.rows) > 0:
            feeds["visual"] = visual.rows
        logits: Logits = self._plans.run("prefill", feeds, slots=self._place)[0][0]
        return logits

    def _write_ids(self, input_ids: Sequence[int]) -> Logits:
        most = self._plans.largest("decode", "input_ids")[1]
        for first in range(0, len(input_ids), most):
            ids = input_ids[first : first + most]
            feeds = self._decode_feeds(ids, first)
            if len(ids) == 1:
                logits: Logits = self._plans.decode(self._place, feeds)[0]
            else:
                logits = self._plans.run("decode", feeds, slots=self._place)[0][0]
        return logits

    def _decode_feeds(self, input_ids: Sequence[int], first: int) -> dict[str, Array]:
        """Of ids that are `first` rows behind the cache.

        The decode plan has the first three; the shared decoder takes new ids as a prompt without pictures.
        """
        rows = np.arange(len(input_ids), dtype=np.int64)
        return {
            "input_ids": np.array([input_ids], np.int64),
            "position_ids": (self._next_position + first + rows)[None],
            "write_index": np.array([self._length + first], np.int64),
            "source": rows[None],
            "visible_until": np.full_like(rows, FOREVER)[None],
            "kept_index": rows[None],
        }


class TensorRTEngine(TensorRTSlot):
    """A single sequence, whatever the plans are built for."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        backend: Backend = "tensorrt",
        check_files: bool = True,
        tensorrt: Any = None,
        cuda: CudaRuntime | None = None,
    ) -> None:
        """`check_files`: hash the plans first. `tensorrt`, `cuda`: modules to use instead of those installed.

        Raises MachineError where TensorRT, CUDA or a GPU is missing or memory is short, PlanError for plans that do
        not fit.
        """
        start = perf_counter()
        plans = OpenPlans(
            bundle,
            manifest,
            backend=backend,
            check_files=check_files,
            tensorrt=tensorrt,
            cuda=cuda,
            num_slots=1,
        )
        super().__init__(plans, 0, perf_counter() - start)

    @property
    def decode_mode(self) -> str:
        """How single ids are decoded, as `Step` says it."""
        return self._plans.steps[1].mode

    def close(self) -> None:
        super().close()
        self._plans.close()


class TensorRTPool(SlotPool[TensorRTSlot]):
    """Several sequences on plans that are built for as many.

    Prompts and several ids at once are one sequence's. A step runs over the first slots, as many as there is a captured
    graph for; or else, where one of those is full and idle, over neighbours, without a graph.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        backend: Backend = "tensorrt",
        num_slots: int | None = None,
        check_files: bool = True,
        tensorrt: Any = None,
        cuda: CudaRuntime | None = None,
    ) -> None:
        """`num_slots`: as many as the plans are built for if None. Else as `TensorRTEngine`; PlanError for more."""
        start = perf_counter()
        self._plans = OpenPlans(
            bundle,
            manifest,
            backend=backend,
            check_files=check_files,
            tensorrt=tensorrt,
            cuda=cuda,
            num_slots=num_slots,
        )
        took = perf_counter() - start
        slots = (TensorRTSlot(self._plans, number, took) for number in range(self._plans.num_slots))
        super().__init__(slots, tuple(self._plans.steps))

    @property
    def decode_modes(self) -> dict[int, str]:
        """How a step over so many slots, from the first on, is decoded, as `Step` says it."""
        return {size: step.mode for size, step in self._plans.steps.items()}

    def close(self) -> None:
        super().close()
        self._plans.close()

    def _decode(self, run: range, rows: Mapping[str, Ints]) -> npt.NDArray[np.float32]:
        if len(run) == 1:  # which a shared decoder may run
            slot = self.slots[run.start]
            rows = slot._decode_feeds(rows["input_ids"][0].tolist(), 0)
        return self._plans.decode(run, rows)
