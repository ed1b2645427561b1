"""Who is measured when: everybody once in each round, in an order that turns from round to round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

Measured = TypeVar("Measured")

PAUSE = 0.02
"""Seconds between two turns, in which threads that still spin go to sleep and leave the cores to the next."""


class Rounds(Generic[Measured]):
    """Turns by name."""

    def __init__(self, turns: Mapping[str, Callable[[], Measured]], *, warm_up: int) -> None:
        self._turns, self._warm_up = dict(turns), warm_up
        self._whole: list[dict[str, Measured]] = []

    @property
    def taken(self) -> dict[str, list[Measured]]:
        """By name. Whole rounds alone, those behind the warm-up, wherever a run was broken off."""
        return {name: [found[name] for found in self._whole] for name in self._turns}

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
                self._whole.append(found)
            progress(number + 1, self._warm_up + count)
