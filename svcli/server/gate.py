"""In front of everything: who may come in, how much at a time, and what ends when a client goes away."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from svcli.server.calls import GONE, Call
from svcli.server.limits import Limits
from svcli.server.page import PATHS as PAGE_PATHS
from svcli.server.problems import RETRY_SECONDS, Problem, problem_of

OPEN_PATHS = ("/health", *PAGE_PATHS)
"""What needs no key to be read. The page asks for one, and sends it with what it asks."""
SCOPE_KEY = "svcli.call"
_READING = ("GET", "HEAD")
_LINGER_SECONDS, _LINGER_BYTES = 10.0, 256 << 20
"""How long a body is still read, and thrown away, that was refused: a client reads its answer when all is sent."""
_SLACK_SECONDS = 30.0
"""For reading pictures before an answer, and for a slow reader behind it."""
_log = logging.getLogger("svcli.server")


class Gate:
    """An application around another."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        *,
        key: str | None = None,
        hosts: Sequence[str] | None = None,
        count: Callable[[str, int], None] = lambda _path, _status: None,
    ) -> None:
        """`hosts`: what requests may call this server; None: anything. `count` is told paths and statuses."""
        self._app, self._limits, self._count = app, limits, count
        self._key = None if key is None else key.encode()
        self._hosts = hosts
        self._num_calls = 0
        """That have a body."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = Call.of(scope)
        scope[SCOPE_KEY] = call

        async def noted(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                call.status = message["status"]
            elif message["type"] == "http.response.body":
                call.complete = not message.get("more_body", False)

        try:
            with call.ends:
                await self._let_in(call, scope, receive, noted)
        except _GoneError:
            call.status = GONE
        except asyncio.CancelledError:
            # The server ends, and has waited long enough; its own task ends here either way.
            call.problem = "broken off"
        except Exception as error:
            await self._fail(call, error, scope, receive, noted)
        call.log()
        self._count(call.route, call.status)

    async def _let_in(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self._check(scope["method"], scope["path"], headers)
        if scope["method"] in _READING:
            await self._run(call, scope, b"", receive, send)
            return
        if self._num_calls >= self._limits.max_calls:
            message = f"{self._limits.max_calls} questions are being read or answered already"
            raise Problem(429, message, "queue_full", headers={"Retry-After": str(RETRY_SECONDS)})
        self._num_calls += 1
        try:
            await self._run(call, scope, await self._body(headers, receive), receive, send)
        finally:
            self._num_calls -= 1

    def _check(self, method: str, path: str, headers: Headers) -> None:
        """Raises Problem for a request that must not come in."""
        if self._hosts is not None and _host(headers.get("host", "")) not in self._hosts:
            # A page from elsewhere, whose name leads here, must not ask in its reader's name.
            raise Problem(403, "this server is not called by that name", "host_not_allowed")
        if self._key is None or (path in OPEN_PATHS and method in _READING):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            message = "a key is needed: Authorization: Bearer KEY"
            raise Problem(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """All of it. Raises Problem for one that is too large or too slow."""
        too_large = Problem(413, f"the body is larger than {self._limits.max_body} bytes", "body_too_large")
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._limits.max_body:
            raise too_large
        body, more = bytearray(), True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.upload_seconds
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - loop.time()))
            except asyncio.TimeoutError:
                raise Problem(408, "the request did not come in time", "timeout") from None
            if message["type"] == "http.disconnect":
                raise _GoneError
            body += message.get("body", b"")
            if len(body) > self._limits.max_body:
                raise too_large
            more = message.get("more_body", False)
        return bytes(body)

    async def _run(self, call: Call, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Runs the application, until it is done, its client goes away, or it takes too long."""
        bodies = [body]

        async def replay() -> Message:
            if not bodies:
                await asyncio.Event().wait()  # what a client does then is watched here
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}

        work: asyncio.Task[Any] = asyncio.ensure_future(self._app(scope, replay, send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            seconds = self._limits.seconds + _SLACK_SECONDS
            await asyncio.wait({work, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done() or call.complete:
                await work
            elif leaving.done():
                raise _GoneError
            else:
                raise Problem(504, "the request took too long", "timeout")
        finally:
            for task in (work, leaving):
                task.cancel()
            await asyncio.gather(work, leaving, return_exceptions=True)

    async def _fail(self, call: Call, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        """Says what went wrong, where it can still be said."""
        problem = problem_of(error)
        call.problem = call.problem or problem.code or ""
        if not isinstance(error, Problem):
            _log.error("%s failed: %r", call.route, error, exc_info=_log.isEnabledFor(logging.DEBUG))
        if call.status:
            return
        response = problem.response()

        async def lingering(message: Message) -> None:
            if message["type"] != "http.response.body":
                await send(message)
                return
            await send({**message, "more_body": True})
            await _throw_away(receive)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await response(scope, receive, lingering)


class _GoneError(Exception):
    """The client went away."""


async def _left(receive: Receive) -> None:
    """Until the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _throw_away(receive: Receive) -> None:
    """What is left of a body, within bounds."""
    left = _LINGER_BYTES

    async def read() -> None:
        nonlocal left
        while left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if not message.get("more_body", False):
                return

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), _LINGER_SECONDS)


def _host(header: str) -> str:
    """The name in a Host header, without its port; any loopback address is `localhost`."""
    name = header.rpartition("]")[0].lstrip("[") if header.startswith("[") else header.partition(":")[0]
    try:
        return "localhost" if ipaddress.ip_address(name).is_loopback else name
    except ValueError:
        return name.lower().rstrip(".")
