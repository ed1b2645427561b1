"""What a client is told of an answer that breaks off and is made again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

import pytest
from starlette.types import Message

from svcli.server.calls import Identity
from svcli.server.relay import OtherAnswerError, Relay, Sent, messages_of
from svcli_engines.processor import Processor
from tests.server.conftest import END, Inside, Opener, Speaker, events, question

IDENTITY = Identity(number=7, created=1)
TEXT = "a red ball."


class Client:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.relay = Relay(self._note)

    async def _note(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def body(self) -> str:
        return b"".join(each.get("body", b"") for each in self.messages).decode()

    @property
    def text(self) -> str:
        """Of a stream that has come to its end."""
        chunks = events(self.body)
        assert {each["id"] for each in chunks} == {f"chatcmpl-{7:032x}"}
        return "".join(each["choices"][0]["delta"].get("content", "") for each in chunks)


async def sent_by(server: Inside, identity: Identity = IDENTITY, **options: Any) -> list[Sent]:
    body = json.dumps(question(**options)).encode()
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}
    return [each async for each in messages_of(server.gate, scope, body, identity)]


async def hand_on(relay: Relay, sent: list[Sent]) -> None:
    for message, ids in sent:
        await relay.take(message, ids)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


@pytest.mark.parametrize("num_told", range(1, 7))
def test_a_stream_goes_on_where_it_broke_off_and_nothing_is_said_twice(
    inside: Opener, processor: Processor, num_told: int
) -> None:
    """Also where the second would say something else, as one does whose arithmetic differs in its last bits."""
    one, other = inside([Speaker(processor)]), inside([Speaker(processor, "big fat cats sleep.")])

    async def break_off() -> None:
        client = Client()
        first = await sent_by(one, stream=True)
        assert len(first) == 8  # the start, the role, four tokens, the end, and the end of the connection
        await hand_on(client.relay, first[:num_told])
        told = client.body
        assert "[DONE]" not in told
        client.relay.again()
        again = Identity(IDENTITY.number, IDENTITY.created, tuple(client.relay.ids))
        await hand_on(client.relay, await sent_by(other, again, stream=True))
        assert client.relay.complete
        assert client.body.startswith(told)
        assert [each["type"] for each in client.messages].count("http.response.start") == 1
        assert client.text == processor.decode([each for each in client.relay.ids if each != END])
        assert client.text != TEXT

    run(break_off())


def test_a_stream_that_goes_another_way_is_not_handed_on(inside: Opener, processor: Processor) -> None:
    one, other = inside([Speaker(processor)]), inside([Speaker(processor, "big fat cats sleep.")])

    async def differ() -> None:
        client = Client()
        await hand_on(client.relay, (await sent_by(one, stream=True))[:5])
        told = client.body
        for different in (
            await sent_by(other, stream=True),
            await sent_by(one, stream=True, max_tokens=1),
            await sent_by(one, stream=False),
            await sent_by(one, stream=True, n=2),
        ):
            client.relay.again()
            with pytest.raises(OtherAnswerError):
                await hand_on(client.relay, different)
        assert client.body == told

    run(differ())


@pytest.mark.parametrize("options", [{}, {"n": 2}])
def test_what_is_no_stream_is_told_as_a_whole_or_not_at_all(inside: Opener, options: dict[str, Any]) -> None:
    server = inside()

    async def break_off() -> None:
        client = Client()
        sent = await sent_by(server, **options)
        await hand_on(client.relay, sent[:-1])
        assert not client.messages
        assert not client.relay.begun
        client.relay.again()
        await hand_on(client.relay, await sent_by(server, **options))
        assert client.relay.complete
        said = json.loads(client.body)
        assert said["error"]["param"] == "n" if options else said["choices"][0]["message"]["content"] == TEXT

    run(break_off())


def test_a_stream_that_was_told_to_its_last_event_needs_no_second(inside: Opener) -> None:
    async def break_off() -> None:
        client = Client()
        sent = await sent_by(inside(), stream=True)
        await hand_on(client.relay, sent[:-2])
        await client.relay.end_if_told()
        assert "[DONE]" not in client.body
        await hand_on(client.relay, sent[-2:-1])
        await client.relay.end_if_told()
        assert client.relay.complete
        assert client.text == TEXT

    run(break_off())


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 3}])
def test_with_the_same_identity_an_answer_is_the_same(inside: Opener, options: dict[str, Any]) -> None:
    async def ask_again() -> None:
        one, two, other = [
            await sent_by(inside(), identity, stream=True, **options)
            for identity in (IDENTITY, IDENTITY, Identity(8, 1))
        ]
        assert one == two
        assert one != other

    run(ask_again())


def test_closing_it_ends_the_request(inside: Opener, processor: Processor) -> None:
    server = inside([Speaker(processor, None)])

    async def hang_up() -> None:
        body = json.dumps(question(stream=True, max_tokens=1000)).encode()
        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": headers,
            "query_string": b"",
        }
        async with aclosing(messages_of(server.gate, scope, body, IDENTITY)) as sent:
            await anext(sent)
            assert server.served.scheduler.load().num_running == 1

    run(hang_up())
    server.served.scheduler.close(30)  # would take far longer than the answer's end
    assert b'status="499"' in server.metrics.text()
