"""Sequences side by side: what every engine counts of its KV cache, and a step over some of many.

What computes rows derives from these, and leaves the counting to them. Imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from skipvision.layout import Ints, TokenLayout
from svcli_engines.base import (
    Logits,
    MachineError,
    Visual,
    check_extend,
    check_positions,
    check_prefill,
    check_rewind,
)


class Slot(ABC):
    """One sequence: how many rows its cache holds, and where the next one stands."""

    def __init__(self, capacity: int, max_positions: int) -> None:
        self._capacity, self._max_positions = capacity, max_positions
        self._length = self._next_position = 0

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def length(self) -> int:
        return self._length

    @property
    def next_position(self) -> int:
        return self._next_position

    def prefill(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        return self._fill(input_ids, visual, layout, 0, 0)

    def append(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        return self._fill(input_ids, visual, layout, self._length, self._next_position)

    def extend(self, input_ids: Sequence[int]) -> Logits:
        self.check_room(len(input_ids))
        logits = self._write_ids(input_ids)
        self.grow(len(input_ids))
        return logits

    def check_room(self, num_new: int) -> None:
        """Raises EngineError where `extend` by so many ids would."""
        check_extend(num_new, self._length, self._capacity)
        check_positions(self._next_position + num_new, self._max_positions)

    def grow(self, num_new: int) -> None:
        """Counts rows that were written behind the cache."""
        self._length, self._next_position = self._length + num_new, self._next_position + num_new

    def rewind(self, num_rows: int, next_position: int) -> None:
        check_rewind(num_rows, self._length)
        self._length, self._next_position = num_rows, next_position

    def reset(self) -> None:
        self._length = self._next_position = 0

    def close(self) -> None:
        """Empties the cache; the memory is the pool's."""
        self.reset()

    def _fill(
        self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout, length: int, next_position: int
    ) -> Logits:
        """The rows of `layout` behind the first `length` rows of the cache."""
        check_prefill(layout, visual, self._capacity, length)
        check_positions(next_position + layout.length, self._max_positions)
        self._length, self._next_position = length, next_position  # which is true, whatever comes of the rest
        logits = self._write_prompt(input_ids, visual, layout)
        self._length, self._next_position = length + layout.num_kept, next_position + layout.length
        return logits

    @abstractmethod
    def _write_prompt(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        """Computes the rows of `layout`, which fit, behind `length`; logits [vocab] of the last."""

    @abstractmethod
    def _write_ids(self, input_ids: Sequence[int]) -> Logits:
        """Computes new ids, which fit, behind `length`; logits [vocab] of the last."""


AnySlot = TypeVar("AnySlot", bound=Slot)


class SlotPool(ABC, Generic[AnySlot]):
    """Slots in one buffer, of which neighbours are computed in one run. For one thread: nothing here is locked."""

    def __init__(self, slots: Iterable[AnySlot], recorded: Sequence[int] = ()) -> None:
        """`recorded`: how many slots, from the first on, there are recorded steps for; ascending."""
        self.slots, self._recorded = tuple(slots), tuple(recorded)

    def step(self, new_ids: Mapping[int, int]) -> dict[int, Logits]:
        """As Pool says. Idle slots between those asked for are computed too, so low numbers side by side are best."""
        for number in new_ids:
            self.slots[number].check_room(1)
        logits: dict[int, Logits] = {}
        for run in self._runs(new_ids):
            found = self._decode(run, self._rows(new_ids, run))
            logits |= {number: row for number, row in zip(run, found, strict=True) if number in new_ids}
        for number in new_ids:
            self.slots[number].grow(1)
        return {number: logits[number] for number in new_ids}

    def width(self, numbers: Collection[int]) -> int:
        return sum(map(len, self._runs(numbers)))

    def close(self) -> None:
        for slot in self.slots:
            slot.close()

    @abstractmethod
    def _decode(self, run: range, rows: Mapping[str, Ints]) -> npt.NDArray[np.float32]:
        """Logits [n, vocab] of one id in each of n neighbouring slots; `rows` as the decode graph takes them."""

    def _runs(self, numbers: Collection[int]) -> Iterator[range]:
        """Neighbouring slots with all of `numbers` among them; but none that is full, since each is written to."""
        whole = next((size for size in self._recorded if size > max(numbers, default=size)), 0)
        if whole and self._are_free(slot for slot in range(whole) if slot not in numbers):
            yield range(whole)
            return
        run: range | None = None
        for number in sorted(numbers):
            if run is not None and self._are_free(range(run.stop, number)):
                run = range(run.start, number + 1)
                continue
            if run is not None:
                yield run
            run = range(number, number + 1)
        if run is not None:
            yield run

    def _are_free(self, numbers: Iterable[int]) -> bool:
        """Whether each has a row behind its length, which nothing reads."""
        return all(self.slots[number].length < self.slots[number].capacity for number in numbers)

    def _rows(self, new_ids: Mapping[int, int], run: range) -> dict[str, Ints]:
        """Idle slots take any id: its row lies behind their length."""
        slots = self.slots[run.start : run.stop]
        places = zip(run, slots, strict=True)
        return {
            "input_ids": np.array([[new_ids.get(number, 0)] for number in run], np.int64),
            "position_ids": np.array([[slot.next_position if n in new_ids else 0] for n, slot in places], np.int64),
            "write_index": np.array([slot.length for slot in slots], np.int64),
        }


def batch_sizes(num_slots: int) -> tuple[int, ...]:
    """Powers of two up to `num_slots`, and that: for each there is a recorded step."""
    powers = (1 << exponent for exponent in range(num_slots.bit_length()))
    return (*(size for size in powers if size < num_slots), num_slots)


def check_memory(num_slots: int, num_bytes: int, free: int) -> None:
    """Raises MachineError where a GPU has less than `num_bytes` free, which so many sequences take."""
    if num_bytes > free:
        sequences, fewer = ("a sequence", "") if num_slots == 1 else (f"{num_slots} sequences", "run fewer at a time, ")
        taken = f"KV cache and scratch memory of {sequences} take {-(-num_bytes >> 20)} MiB"
        mends = f"{fewer}end what else uses it, or export with a smaller context"
        raise MachineError(f"{taken} and the GPU has {free >> 20} MiB free; {mends}")
