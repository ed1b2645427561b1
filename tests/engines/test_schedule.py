"""Many answers from one pool: each is what it would be alone, and whatever goes wrong with one, the others go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import Queue

import numpy as np
import pytest
from PIL import Image

from svcli_engines.answer import Stats
from svcli_engines.base import Engine, EngineError, Logits
from svcli_engines.generate import Conversation
from svcli_engines.processor import Processor
from svcli_engines.sampling import Sampling
from svcli_engines.schedule import BusyError, ClosingError, LateError, Request, Scheduler
from svcli_engines.turn import Piece
from svcli_export.chat import Message
from tests.engines.conftest import Exported
from tests.engines.test_generate import OTHER, PICTURE, Scripted, split

LONG = Sampling(max_new_tokens=500)
CAPACITY = 10**9
"""No answer here ends for want of room."""
SECONDS = 120.0
"""Longer than anything here takes, however busy the machine is."""


class Gated(Scripted):
    """Says the same for ever, and computes nothing while its gate is shut."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__(iter(lambda: 9, None), capacity=CAPACITY)
        self.gate = gate

    def _next(self) -> Logits:
        assert self.gate.wait(SECONDS)
        return super()._next()


class Several:
    """A pool of engines that know nothing of one another."""

    def __init__(self, slots: Sequence[Engine]) -> None:
        self.slots = slots
        self.steps: list[list[int]] = []
        self.closed = False

    def step(self, new_ids: Mapping[int, int]) -> dict[int, Logits]:
        self.steps.append(sorted(new_ids))
        return {slot: self.slots[slot].extend([token]) for slot, token in new_ids.items()}

    def width(self, numbers: Collection[int]) -> int:
        return max(numbers) - min(numbers) + 1

    def close(self) -> None:
        self.closed = True


class Caller:
    """Somebody who asks, and what is heard."""

    def __init__(self, scheduler: Scheduler, text: str, images: Sequence[Image.Image] = (), **options: object) -> None:
        self.heard: Queue[Piece | Stats | Exception] = Queue()
        sampling = options.pop("sampling", LONG)
        question = scheduler.question([Message("user", text, images=len(images))], images)
        self.request: Request = scheduler.submit(question, sampling, self.heard.put, **options)  # type: ignore[arg-type]

    def wait(self) -> tuple[str, Stats | Exception]:
        text = ""
        while isinstance(event := self.heard.get(timeout=SECONDS), Piece):
            text += event.text
        return text, event


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


@contextmanager
def scheduled(pool: Several, processor: Processor, max_waiting: int = 64) -> Iterator[Scheduler]:
    scheduler = Scheduler(pool, processor, max_waiting=max_waiting)
    try:
        yield scheduler
    finally:
        for slot in pool.slots:
            if isinstance(slot, Gated):
                slot.gate.set()
        scheduler.close()
        assert pool.closed


@pytest.fixture
def processor(exported: Exported) -> Processor:
    return exported.processor


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


def test_each_answer_is_what_it_would_be_alone(exported: Exported) -> None:
    processor, sampling = exported.processor, Sampling(max_new_tokens=6)
    asked = [("what is this?", [PICTURE]), ("a ball?", []), ("how many?", [OTHER]), ("what is this?", [OTHER, PICTURE])]
    alone = [
        split(Conversation(exported.onnx_engine(), processor).ask(text, images, sampling))[0] for text, images in asked
    ]
    with scheduled(Several([exported.onnx_engine() for _ in range(2)]), processor) as scheduler:
        callers = [Caller(scheduler, text, images, sampling=sampling) for text, images in asked * 3]
        assert [caller.wait()[0] for caller in callers] == alone * 3


def test_answers_are_decoded_side_by_side(processor: Processor, gate: threading.Event) -> None:
    pool = Several([Gated(gate) for _ in range(3)])
    with scheduled(pool, processor) as scheduler:
        callers = [Caller(scheduler, "what?", sampling=Sampling(max_new_tokens=20)) for _ in range(3)]
        gate.set()
        for caller in callers:
            text, stats = caller.wait()
            assert isinstance(stats, Stats)
            assert stats.num_tokens == 20
            assert text
    assert [0, 1, 2] in pool.steps


def test_more_than_can_wait_are_refused_at_once(processor: Processor, gate: threading.Event) -> None:
    with scheduled(Several([Gated(gate)]), processor, max_waiting=2) as scheduler:
        first = Caller(scheduler, "what?", sampling=Sampling(max_new_tokens=2))
        wait_until(lambda: scheduler.load().num_running == 1)
        others = [Caller(scheduler, "and?", sampling=Sampling(max_new_tokens=2)) for _ in range(2)]
        with pytest.raises(BusyError, match="2 questions are waiting"):
            Caller(scheduler, "me too?")
        gate.set()
        for caller in (first, *others):
            assert isinstance(caller.wait()[1], Stats)


def test_a_burst_is_taken_as_far_as_there_are_slots(processor: Processor, gate: threading.Event) -> None:
    with scheduled(Several([Gated(gate) for _ in range(3)]), processor, max_waiting=1) as scheduler:
        callers = [Caller(scheduler, "what?", sampling=Sampling(max_new_tokens=2)) for _ in range(4)]
        with pytest.raises(BusyError):
            Caller(scheduler, "me too?")
        gate.set()
        assert all(isinstance(caller.wait()[1], Stats) for caller in callers)


def test_who_goes_away_makes_room_and_hears_no_more(processor: Processor, gate: threading.Event) -> None:
    gate.set()
    with scheduled(Several([Gated(gate)]), processor) as scheduler:
        gone, next_one = Caller(scheduler, "what?", sampling=Sampling(max_new_tokens=10**8)), None
        assert isinstance(gone.heard.get(timeout=SECONDS), Piece)
        scheduler.cancel(gone.request)
        next_one = Caller(scheduler, "and?", sampling=Sampling(max_new_tokens=2))
        assert isinstance(next_one.wait()[1], Stats)
        left = gone.heard.qsize()
        assert not any(isinstance(gone.heard.get(), Stats) for _ in range(left))
        assert scheduler.load().num_running == 0


def test_who_waits_in_the_queue_can_go_away(processor: Processor, gate: threading.Event) -> None:
    with scheduled(Several([Gated(gate)]), processor, max_waiting=1) as scheduler:
        first = Caller(scheduler, "what?", sampling=Sampling(max_new_tokens=2))
        wait_until(lambda: scheduler.load().num_running == 1)
        gone = Caller(scheduler, "and?")
        scheduler.cancel(gone.request)
        gate.set()
        assert isinstance(first.wait()[1], Stats)
        assert isinstance(Caller(scheduler, "I?", sampling=Sampling(max_new_tokens=2)).wait()[1], Stats)
        assert gone.heard.empty()


def test_what_is_late_ends(processor: Processor, gate: threading.Event) -> None:
    gate.set()
    with scheduled(Several([Gated(gate)]), processor) as scheduler:
        running = Caller(scheduler, "what?", sampling=Sampling(max_new_tokens=10**8), seconds=0.2)
        waiting = Caller(scheduler, "and?", seconds=0.0)
        assert isinstance(running.wait()[1], LateError)
        assert isinstance(waiting.wait()[1], LateError)


def test_an_error_in_one_prompt_is_told_and_the_next_is_answered(processor: Processor, gate: threading.Event) -> None:
    class Broken(Gated):
        broken = True

        def append(self, *arguments: object) -> Logits:
            if self.broken:
                self.broken = False
                raise EngineError("out of memory")
            return super().append(*arguments)  # type: ignore[arg-type]

    gate.set()
    with scheduled(Several([Broken(gate)]), processor) as scheduler:
        assert "out of memory" in str(Caller(scheduler, "what?").wait()[1])
        assert isinstance(Caller(scheduler, "and?", sampling=Sampling(max_new_tokens=2)).wait()[1], Stats)


def test_an_error_in_a_step_ends_its_answers_and_no_others(processor: Processor, gate: threading.Event) -> None:
    class Breaking(Several):
        def step(self, new_ids: Mapping[int, int]) -> dict[int, Logits]:
            if len(self.steps) == 3:
                self.steps.append([])
                raise EngineError("the device is gone")
            return super().step(new_ids)

    gate.set()
    with scheduled(Breaking([Gated(gate)]), processor) as scheduler:
        text, error = Caller(scheduler, "what?").wait()
        assert text
        assert "the device is gone" in str(error)
        _, stats = Caller(scheduler, "what?", sampling=Sampling(max_new_tokens=2)).wait()
        assert isinstance(stats, Stats)
        assert stats.num_shared_rows == 0  # what was in the cache is not trusted


def test_the_next_turn_finds_the_rows_of_the_one_before(exported: Exported) -> None:
    sampling = Sampling(max_new_tokens=3)
    with scheduled(Several([exported.onnx_engine() for _ in range(3)]), exported.processor) as scheduler:
        firsts = [Caller(scheduler, text, [PICTURE], sampling=sampling) for text in ("a", "b", "c")]
        texts = [caller.wait()[0] for caller in firsts]
        for first, text in zip(firsts, texts, strict=True):
            heard: Queue[Piece | Stats | Exception] = Queue()
            messages = [*first.request.question.messages, Message("assistant", text), Message("user", "why?")]
            scheduler.submit(scheduler.question(messages, [PICTURE]), sampling, heard.put)
            while isinstance(event := heard.get(timeout=SECONDS), Piece):
                pass
            assert isinstance(event, Stats)
            assert event.num_shared_rows > 8
            assert event.vision_seconds == 0


def test_answers_stay_together_in_slots_that_were_left_alone(processor: Processor, gate: threading.Event) -> None:
    pool = Several([Gated(gate) for _ in range(4)])
    with scheduled(pool, processor) as scheduler:
        callers = [Caller(scheduler, "what?", sampling=Sampling(max_new_tokens=n)) for n in (90, 50, 70, 30)]
        gate.set()
        for caller in callers:
            caller.wait()
        pool.steps.clear()
        one = Caller(scheduler, "and?", sampling=Sampling(max_new_tokens=10**8))
        assert isinstance(one.heard.get(timeout=SECONDS), Piece)
        two = Caller(scheduler, "why?", sampling=Sampling(max_new_tokens=10**8))
        assert isinstance(two.heard.get(timeout=SECONDS), Piece)
        for caller in (one, two):
            scheduler.cancel(caller.request)
    # They ended in the order 3, 1, 2, 0. Behind 3, the older half of the others is 1 and 2, and 2 is beside it.
    assert pool.steps[0] == [3]
    assert pool.steps[-1] in ([2, 3], [2], [3])
    assert [2, 3] in pool.steps


def test_a_picture_is_looked_at_between_two_steps(processor: Processor, gate: threading.Event) -> None:
    gate.set()
    with scheduled(Several([Gated(gate)]), processor) as scheduler:
        caller = Caller(scheduler, "what?", sampling=Sampling(max_new_tokens=10**8))
        assert isinstance(caller.heard.get(timeout=SECONDS), Piece)
        (picture,) = scheduler.question([Message("user", "-", images=1)], [PICTURE]).pictures
        seen: Queue[object] = Queue()
        for _ in range(2):
            scheduler.look(picture, seen.put)
        first, second = (seen.get(timeout=SECONDS) for _ in range(2))
        assert first is second  # it was encoded once
        assert scheduler.load().num_running == 1
        scheduler.cancel(caller.request)
    with pytest.raises(ClosingError):
        scheduler.look(picture, seen.put)


def test_closing_ends_what_was_taken(processor: Processor, gate: threading.Event) -> None:
    pool = Several([Gated(gate)])
    scheduler = Scheduler(pool, processor)
    callers = [Caller(scheduler, "what?", sampling=Sampling(max_new_tokens=2)) for _ in range(3)]
    gate.set()
    assert scheduler.close(SECONDS)
    assert all(isinstance(caller.wait()[1], Stats) for caller in callers)
    with pytest.raises(BusyError, match="shutting down"):
        Caller(scheduler, "and?")


def test_closing_breaks_off_what_takes_too_long(processor: Processor, gate: threading.Event) -> None:
    gate.set()
    scheduler = Scheduler(Several([Gated(gate)]), processor)
    callers = [Caller(scheduler, "what?", sampling=Sampling(max_new_tokens=10**8)) for _ in range(2)]
    assert not scheduler.close(0.05)
    assert all(isinstance(caller.wait()[1], ClosingError) for caller in callers)


def test_load_says_what_is_in_use(processor: Processor, gate: threading.Event) -> None:
    with scheduled(Several([Gated(gate), Gated(gate)]), processor) as scheduler:
        before = scheduler.load()
        assert (before.alive, before.num_running, before.num_slots, before.kv_rows) == (True, 0, 2, 0)
        assert before.kv_bytes_reserved == 2 * CAPACITY * 10
        caller = Caller(scheduler, "what?", [PICTURE], sampling=Sampling(max_new_tokens=2))
        wait_until(lambda: scheduler.load().kv_rows > 0)
        assert scheduler.load().visual_bytes == np.zeros((12, 32), np.float32).nbytes + 4 * 8
        gate.set()
        caller.wait()
