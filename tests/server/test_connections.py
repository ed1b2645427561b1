"""Connections that do not say what they want are closed; those that do may take their time."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.server.conftest import SECONDS, Process, serving

HEAD_SECONDS = 1.0
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def impatient() -> Iterator[Process]:
    first = f"from svcli.server import protocol; protocol.HEAD_SECONDS = {HEAD_SECONDS}"
    with serving("--parallel", "1", first=first) as process:
        yield process


def connected(process: Process) -> socket.socket:
    place = urlsplit(process.url)
    return socket.create_connection((place.hostname or "", place.port or 0), timeout=SECONDS)


def seconds_until_closed(connection: socket.socket, start: float, *, sending: bytes = b"") -> float:
    """From `start`, which was before the server began to wait. `sending`: again and again meanwhile."""
    connection.settimeout(0.1)
    while time.monotonic() - start < SECONDS:
        try:
            if not connection.recv(1 << 16):
                break
        except TimeoutError:
            pass
        except ConnectionError:
            break
        try:
            connection.sendall(sending)
        except ConnectionError:
            break
    return time.monotonic() - start


def heard(connection: socket.socket) -> bytes:
    """A whole answer that is short."""
    text = b""
    while b"\r\n\r\n" not in text or not text.endswith(b"}"):
        text += connection.recv(1 << 16)
    return text


def test_one_that_says_nothing_is_closed(impatient: Process) -> None:
    start = time.monotonic()
    with connected(impatient) as connection:
        assert HEAD_SECONDS / 2 < seconds_until_closed(connection, start) < SECONDS


def test_one_whose_headers_come_byte_by_byte_is_closed(impatient: Process) -> None:
    start = time.monotonic()
    with connected(impatient) as connection:
        connection.sendall(HEALTH + b"X: ")
        assert HEAD_SECONDS / 2 < seconds_until_closed(connection, start, sending=b"a") < SECONDS


def test_a_further_request_has_no_more_time_than_the_first(impatient: Process) -> None:
    with connected(impatient) as connection:
        connection.sendall(HEALTH + b"\r\n")
        assert b" 200 " in heard(connection)
        start = time.monotonic()
        connection.sendall(HEALTH + b"X: ")
        assert HEAD_SECONDS / 2 < seconds_until_closed(connection, start, sending=b"a") < SECONDS


def test_a_body_that_nobody_waits_for_does_not_hold_a_connection(impatient: Process) -> None:
    with connected(impatient) as connection:
        connection.sendall(HEALTH + b"Content-Length: 1000000\r\n\r\n")
        assert b" 200 " in heard(connection)
        start = time.monotonic()
        assert HEAD_SECONDS / 2 < seconds_until_closed(connection, start, sending=b"a") < SECONDS


def test_a_question_that_comes_slowly_is_answered(impatient: Process) -> None:
    body = json.dumps({"model": "skipvision-tiny", "messages": [{"role": "user", "content": "hello"}]}).encode()
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    start = f"POST /v1/chat/completions HTTP/1.1\r\n{head}".encode()
    with connected(impatient) as connection:
        connection.sendall(start)
        for place in range(0, len(body), len(body) // 5):
            time.sleep(HEAD_SECONDS / 3)
            connection.sendall(body[place : place + len(body) // 5])
        assert b" 200 " in heard(connection)
        # Behind an answer, it may ask again.
        connection.sendall(HEALTH + b"\r\n")
        assert b" 200 " in heard(connection)
