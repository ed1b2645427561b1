"""From the scheduler's thread to the event loop."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from svcli_engines.answer import Stats
from svcli_engines.question import Question
from svcli_engines.sampling import Sampling
from svcli_engines.schedule import Scheduler
from svcli_engines.turn import Piece

Event = Piece | Stats


class Answering:
    """An answer in the making. Events wait here for a slow reader, no more of them than the answer has tokens."""

    def __init__(self, scheduler: Scheduler, question: Question, sampling: Sampling, seconds: float) -> None:
        """Asks. Raises BusyError. Whoever has asked cancels in the end, however it ends."""
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()

        def report(event: Event | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed, and nobody listens
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._scheduler = scheduler
        self._request = scheduler.submit(question, sampling, report, seconds=seconds)

    async def next(self) -> Event:
        """Pieces, and Stats last. Raises what the scheduler reports, such as LateError."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self) -> None:
        """Nobody listens any more; without effect behind the last event."""
        self._scheduler.cancel(self._request)
