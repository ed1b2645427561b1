"""Runs an application on a socket, until a signal: what was taken is ended first."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from svcli.server.protocol import Protocol
from svcli_engines.schedule import Scheduler

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SILENT_MS = 60_000
"""A client that takes nothing for so long is gone, whatever it says."""
_LAST_WORDS_SECONDS = 5
"""For telling those whose answers were broken off."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet; port 0 is any that is free. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENT_MS)
        found.bind(address)
    except OSError:
        found.close()
        raise
    return found


def address(listener: socket.socket) -> str:
    """The URL of a socket, without a path."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    app: ASGIApp, listener: socket.socket, schedulers: Sequence[Scheduler], drain: float, started: Callable[[], None]
) -> bool:
    """Serves until a signal, then ends what was taken within `drain` seconds. Whether all was ended.

    A second signal ends the process at once.
    """
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=int(drain) + _LAST_WORDS_SECONDS,
    )
    server = _Server(config, schedulers, drain, started)
    server.run([listener])
    return server.all_ended


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, schedulers: Sequence[Scheduler], drain: float, started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._schedulers, self._drain, self._tell = schedulers, drain, started
        self.all_ended = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Listening ends within the first; the others end what was taken, or break it off.
        closing = (asyncio.to_thread(each.close, self._drain) for each in self._schedulers)
        _, *ended = await asyncio.gather(super().shutdown(sockets), *closing)
        self.all_ended = all(ended)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leaves it to the caller to say how the process ends."""
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        super().handle_exit(sig, frame)
