"""Who is measured when: everybody once in each round, in an order that turns from round to round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

Measured = TypeVar("Measured")

PAUSE = 0.02
"""Seconds between two turns, in which threads that still spin go to sleep and leave the cores to the next."""


class Rounds(Generic[Measured]):
    """Turns by name. `taken` has whole rounds alone, those behind the warm-up, also where a run is broken off."""

    def __init__(self, turns: Mapping[str, Callable[[], Measured]], *, warm_up: int) -> None:
        self.taken: dict[str, list[Measured]] = {name: [] for name in turns}
        self._turns, self._warm_up = dict(turns), warm_up

    def run(
        self,
        count: int,
        *,
        progress: Callable[[int, int], None] = lambda _done, _all: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`count` rounds that are kept. Whoever is last in one is first in the next."""
        for number in range(self._warm_up + count):
            names = list(self._turns)[:: -1 if number % 2 else 1]
            found: dict[str, Measured] = {}
            for name in names:
                found[name] = self._turns[name]()
                sleep(PAUSE)
            if number >= self._warm_up:
                for name, value in found.items():
                    self.taken[name].append(value)
            progress(number + 1, self._warm_up + count)
