"""Many callers, one pool of sequences: questions wait in a bounded queue, and answers are decoded side by side.

Continuous batching (Orca, OSDI 2022) without paging: each answer has a slot, whose KV cache has the reduced capacity.
A slot that is free keeps its rows until another question needs it, so that the next turn of a conversation finds them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from PIL import Image

from svcli_engines.answer import Answer, KnownCache, Stats
from svcli_engines.base import Logits, Pool, Visual
from svcli_engines.pictures import Picture, VisualCache
from svcli_engines.processor import Processor
from svcli_engines.question import Question
from svcli_engines.sampling import Sampling
from svcli_engines.turn import Piece
from svcli_export.chat import Message


class BusyError(RuntimeError):
    """A question that was not taken: too many wait, or the scheduler is closing."""


class ClosingError(BusyError):
    """A question that was not taken, or is not answered to its end, since the scheduler takes no more."""


class LateError(RuntimeError):
    """An answer that was not there in time."""


Report = Callable[[Piece | Stats | Exception], None]
"""Called by the scheduler's thread: pieces, and last Stats or what went wrong. It must not block."""


LookReport = Callable[[Visual | Exception], None]
"""The same for a picture that is looked at, without a question."""


@dataclass(eq=False)
class Request:
    """A question that was taken."""

    question: Question
    sampling: Sampling
    report: Report
    deadline: float | None
    """By `perf_counter`."""
    asked_at: float
    cancelled: bool = False


@dataclass
class _Slot:
    cache: KnownCache
    used_at: float = 0.0
    request: Request | None = None
    answer: Answer | None = None


@dataclass(frozen=True)
class Load:
    """What is going on."""

    alive: bool
    closing: bool
    """Takes no more."""
    num_waiting: int
    num_running: int
    num_slots: int
    kv_rows: int
    """In use by answers that are being made."""
    kv_bytes: int
    kv_bytes_reserved: int
    """Of all slots, in use or not."""
    visual_bytes: int
    """Of visual rows that are kept for pictures that come again."""


class Scheduler:
    """Runs a pool on a thread of its own. Every method may be called by any thread."""

    def __init__(
        self, pool: Pool, processor: Processor, *, max_waiting: int = 64, visuals: VisualCache | None = None
    ) -> None:
        """Takes the pool for its own, and closes it."""
        self._pool, self._processor, self._max_waiting = pool, processor, max_waiting
        self._visuals = visuals or VisualCache()
        self._slots = [_Slot(KnownCache(engine, processor, self._visuals)) for engine in pool.slots]
        self._waiting: deque[Request] = deque()
        self._looks: deque[tuple[Picture, LookReport]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="svcli-scheduler", daemon=True)
        self._thread.start()

    def question(self, messages: Sequence[Message], images: Sequence[Image.Image] = ()) -> Question:
        """Makes a conversation ready, pictures and all; on the caller's time. Raises PromptError."""
        return Question(self._processor, messages, images)

    def submit(
        self, question: Question, sampling: Sampling, report: Report, *, seconds: float | None = None
    ) -> Request:
        """Takes a question, which is answered within `seconds` or ends with LateError.

        Raises BusyError where `max_waiting` wait beside those that have a slot, and ClosingError."""
        now = perf_counter()
        request = Request(question, sampling, report, None if seconds is None else now + seconds, now)
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise ClosingError("the server is shutting down")
            num_free = sum(slot.request is None for slot in self._slots)  # whose turn is about to come
            if sum(not each.cancelled for each in self._waiting) >= self._max_waiting + num_free:
                raise BusyError(f"{self._max_waiting} questions are waiting already")
            self._waiting.append(request)
            self._changed.notify()
        return request

    def look(self, picture: Picture, report: LookReport) -> None:
        """Reports what the encoder makes of a picture, or what went wrong; between two steps.

        Raises BusyError where `max_waiting` wait already, and ClosingError."""
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise ClosingError("the server is shutting down")
            if len(self._looks) >= self._max_waiting:
                raise BusyError(f"{self._max_waiting} pictures are waiting already")
            self._looks.append((picture, report))
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Nobody wants the answer any more: its slot is free before the next step, and nothing more is reported."""
        with self._changed:
            request.cancelled = True
            self._changed.notify()

    def load(self) -> Load:
        with self._changed:
            running = [slot for slot in self._slots if slot.request is not None]
            engine = self._slots[0].cache.engine
            rows = sum(slot.cache.engine.length for slot in running)
            return Load(
                alive=self._thread.is_alive(),
                closing=self._closing,
                num_waiting=len(self._waiting),
                num_running=len(running),
                num_slots=len(self._slots),
                kv_rows=rows,
                kv_bytes=rows * engine.kv_bytes_per_row,
                kv_bytes_reserved=len(self._slots) * engine.capacity * engine.kv_bytes_per_row,
                visual_bytes=self._visuals.num_bytes,
            )

    def close(self, seconds: float = 0.0) -> bool:
        """Takes no more, ends what was taken within `seconds` and breaks off the rest. Whether all was ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        ended = not self._thread.is_alive()
        if not ended:
            late = ClosingError("the server is shutting down")
            with self._changed:
                left = [*self._waiting, *(slot.request for slot in self._slots if slot.request is not None)]
                for request in left:
                    if not request.cancelled:
                        request.cancelled = True
                        request.report(late)
                self._changed.notify()
            self._thread.join()
        self._pool.close()
        return ended

    def _run(self) -> None:
        try:
            while self._wait():
                self._look_once()
                self._begin_one()
                self._step()
        except BaseException as error:  # a defect, or no memory: nobody may wait for ever
            with self._changed:
                self._closing = True
                requests = [*self._waiting, *(slot.request for slot in self._slots if slot.request is not None)]
                looks = [report for _, report in self._looks]
                self._waiting.clear()
                self._looks.clear()
            stopped = RuntimeError(f"the scheduler stopped ({error!r})")
            for request in requests:
                _report(request, stopped)
            for report in looks:
                report(stopped)
            raise

    def _wait(self) -> bool:
        """Until there is something to do; False where there will not be."""
        with self._changed:
            while True:
                self._let_go()
                if self._waiting or self._looks or any(slot.request for slot in self._slots):
                    return True
                if self._closing:
                    return False
                self._changed.wait()

    def _let_go(self) -> None:
        """Of what nobody wants, or what is late."""
        now = perf_counter()
        late = LateError("the answer was not there in time")
        for request in [request for request in self._waiting if _is_over(request, now)]:
            self._waiting.remove(request)
            _report(request, late)
        for slot in self._slots:
            if slot.request is not None and _is_over(slot.request, now):
                _report(slot.request, late)
                self._free(slot)

    def _look_once(self) -> None:
        with self._changed:
            if not self._looks:
                return
            picture, report = self._looks.popleft()
        try:
            seen = self._visuals.rows(picture, self._slots[0].cache.engine.encode)
        except Exception as error:
            report(error)
        else:
            report(seen)

    def _begin_one(self) -> None:
        """One prompt between two steps, so that answers that are being made go on."""
        with self._changed:
            if not self._waiting or all(slot.request is not None for slot in self._slots):
                return
            request = self._waiting.popleft()
            slot = self._slots[self._best(request.question)]
            slot.request, slot.used_at = request, perf_counter()
        try:
            answer = slot.cache.begin(request.question, request.sampling, request.asked_at)
        except Exception as error:
            _report(request, error)
            self._free(slot)
            return
        slot.answer = answer
        self._told(slot, request, answer, answer.first)

    def _best(self, question: Question) -> int:
        """The free slot whose rows the question can use, unless that would throw away more than it saves.

        Or else, of the half of them that has been left alone for longest, the one beside which least is computed in
        vain. Always the lowest would keep answers together, and overwrite what a conversation is about to go on from.
        """
        slots = self._slots
        free = [number for number, slot in enumerate(slots) if slot.request is None]
        best = max(free, key=lambda number: slots[number].cache.num_shared(question))
        if 2 * slots[best].cache.num_shared(question) >= slots[best].cache.num_units > 0:
            return best
        running = [number for number, slot in enumerate(slots) if slot.request is not None]
        older = sorted(free, key=lambda number: slots[number].used_at)[: (len(free) + 1) // 2]
        return min(older, key=lambda number: self._pool.width([*running, number]))

    def _step(self) -> None:
        """One token of every answer that is being made."""
        running = {
            number: (slot, slot.request, slot.answer, slot.answer.next_id)
            for number, slot in enumerate(self._slots)
            if slot.request is not None and slot.answer is not None and slot.answer.next_id is not None
        }
        if not running:
            return
        started = perf_counter()
        try:
            logits: dict[int, Logits] = self._pool.step({number: each[3] for number, each in running.items()})
        except Exception as error:
            for slot, request, _, _ in running.values():
                _report(request, error)
                slot.cache.engine.reset()
                self._free(slot)
            return
        seconds = perf_counter() - started
        for number, (slot, request, answer, _) in running.items():
            self._told(slot, request, answer, answer.take(logits[number], seconds))

    def _told(self, slot: _Slot, request: Request, answer: Answer, piece: Piece) -> None:
        if piece.text or piece.tokens:
            _report(request, piece)
        if answer.next_id is None:
            stats = answer.stats()
            self._free(slot)
            _report(request, stats)

    def _free(self, slot: _Slot) -> None:
        slot.request = slot.answer = None
        slot.used_at = perf_counter()


def _is_over(request: Request, now: float) -> bool:
    return request.cancelled or (request.deadline is not None and now > request.deadline)


def _report(request: Request, event: Piece | Stats | Exception) -> None:
    if not request.cancelled:
        request.report(event)
