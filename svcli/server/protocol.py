"""One connection, and how long it may take to say what it wants."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0
"""From the connection, or from the first byte of a further request, to the end of the headers."""


class Protocol(H11Protocol):
    """uvicorn's own, which waits for ever for a first request, and for one that comes byte by byte.

    While a request is being answered, Gate has the time.
    """

    _ends: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._let()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._let()
        elif self._ends is None:
            self._ends = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _let(self) -> None:
        if self._ends is not None:
            self._ends.cancel()
            self._ends = None
