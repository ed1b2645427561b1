"""Hands on an answer that others make, so that one that breaks off is made again and nothing is said twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Send

from svcli.server.calls import IDENTITY_KEY, Call, Identity
from svcli.server.gate import SCOPE_KEY
from svcli.server.replies import DONE

Sent = tuple[Message, tuple[int, ...]]
"""A message of ASGI, and the tokens of the answer that are new in it."""


class OtherAnswerError(RuntimeError):
    """An answer that was made again, and is not the one that was begun."""


async def messages_of(
    app: ASGIApp, scope: Mapping[str, Any], body: bytes, identity: Identity
) -> AsyncGenerator[Sent, None]:
    """What an application behind a Gate sends for one request; ends early where it broke off.

    Closing it ends the request, as a client does that goes away.
    """
    own = {**scope, IDENTITY_KEY: identity}
    sent: asyncio.Queue[Sent | None] = asyncio.Queue()
    gone, bodies = asyncio.Event(), [body]

    async def receive() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        call: Call = own[SCOPE_KEY]
        said, call.said = tuple(call.said), []
        sent.put_nowait((message, said))

    work = asyncio.ensure_future(app(own, receive, send))
    work.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        while (each := await sent.get()) is not None:
            yield each
    finally:
        gone.set()
        await work


class Relay:
    """From messages of ASGI to `send`: events of a stream as they come, anything else as a whole."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._told: list[bytes] = []
        """Events that were handed on."""
        self.ids: list[int] = []
        """Their tokens."""
        self.complete = False
        """Whether the answer is out as a whole."""
        self.again()

    @property
    def begun(self) -> bool:
        """Whether the client has some of the answer."""
        return bool(self._told)

    def again(self) -> None:
        """What comes now begins anew."""
        self._held: list[Message] = []
        self._streams = False
        self._num_seen = 0

    async def take(self, message: Message, ids: Sequence[int] = ()) -> None:
        """`ids` are the message's tokens. Raises OtherAnswerError where it contradicts what was handed on."""
        if message["type"] == "http.response.start":
            self._streams = _is_stream(message)
            self._held.append(message)
            if self.begun and not self._streams:
                raise OtherAnswerError(f"a stream was begun, and now the answer is a {message['status']}")
        elif self._streams:
            await self._take_events(message, ids)
        else:
            self._held.append(message)
            if not message.get("more_body", False):
                await self._let_out()

    async def end_if_told(self) -> None:
        """Ends a stream of which only the end of the connection was missing."""
        if self.begun and self._told[-1].endswith(DONE.encode()):
            await self.end(b"")

    async def end(self, last: bytes) -> None:
        """Ends a stream with some last events."""
        await self._send({"type": "http.response.body", "body": last, "more_body": False})
        self.complete = True

    async def _take_events(self, message: Message, ids: Sequence[int]) -> None:
        events: bytes = message.get("body", b"")
        if events:
            self._num_seen += 1
            if self._num_seen <= len(self._told):
                if _said(events) != _said(self._told[self._num_seen - 1]):
                    raise OtherAnswerError("the answer went another way")
                return
        elif self._num_seen < len(self._told):
            raise OtherAnswerError("the answer ended before what was told of it")
        if self.begun:
            self._held.clear()  # the beginning is out
        if events:
            self._told.append(events)
            self.ids += ids
        self._held.append(message)
        await self._let_out()

    async def _let_out(self) -> None:
        held, self._held = self._held, []
        for message in held:
            await self._send(message)
        self.complete = not held[-1].get("more_body", False)


def _is_stream(start: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"])


def _said(events: bytes) -> list[Any]:
    """What some events say of the answer itself: its text and how it ends, not how likely it was or what it took."""
    found: list[Any] = []
    for line in events.decode().split("\n\n"):
        data = line.removeprefix("data: ")
        if not data or line == DONE.strip():
            found.append(line)
            continue
        content = json.loads(data)
        found += [(each["delta"], each["finish_reason"]) for each in content.get("choices", ())]
        found.append(content.get("error"))
    return found
