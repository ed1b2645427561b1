"""Who is measured when."""

from __future__ import annotations

import pytest

from svcli.bench.rounds import PAUSE, Rounds


class Clock:
    """Turns that note when they were called, and tell how often that was."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.slept: list[float] = []

    def turn(self, name: str, stop_at: int | None = None) -> int:
        self.order.append(name)
        if self.order.count(name) == stop_at:
            raise KeyboardInterrupt
        return self.order.count(name)


def rounds_of(clock: Clock, warm_up: int, stop_b_at: int | None = None) -> Rounds[int]:
    return Rounds({"a": lambda: clock.turn("a"), "b": lambda: clock.turn("b", stop_b_at)}, warm_up=warm_up)


def test_sides_take_turns_and_whoever_was_last_is_first() -> None:
    clock = Clock()
    rounds = rounds_of(clock, warm_up=1)
    seen: list[tuple[int, int]] = []
    rounds.run(3, progress=lambda done, count: seen.append((done, count)), sleep=clock.slept.append)
    assert "".join(clock.order) == "abbaabba"
    assert rounds.taken == {"a": [2, 3, 4], "b": [2, 3, 4]}
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert clock.slept == [PAUSE] * 8


def test_a_round_that_is_broken_off_does_not_count() -> None:
    clock = Clock()
    rounds = rounds_of(clock, warm_up=1, stop_b_at=4)
    with pytest.raises(KeyboardInterrupt):
        rounds.run(9, sleep=clock.slept.append)
    assert rounds.taken == {"a": [2, 3], "b": [2, 3]}


def test_every_side_is_first_as_often_as_the_other() -> None:
    clock = Clock()
    rounds_of(clock, warm_up=2).run(8, sleep=clock.slept.append)
    assert clock.order[::2].count("a") == clock.order[::2].count("b") == 5
