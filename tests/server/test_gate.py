"""Who may come in, how much at a time, and what ends when a client goes away, is late, or the model fails."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import pytest

from svcli.server.limits import Limits
from svcli_engines.base import EngineError, Logits
from svcli_engines.processor import Processor
from tests.engines.test_schedule import Several
from tests.server.conftest import SECONDS, Inside, Opener, Speaker, question

KEY = "a key"


class Gated(Speaker):
    """Computes nothing while its gate is shut."""

    def __init__(self, processor: Processor, gate: threading.Event, text: str | None = None) -> None:
        super().__init__(processor, text)
        self.gate = gate

    def _next(self) -> Logits:
        assert self.gate.wait(SECONDS)
        return super()._next()


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("given", [None, "Bearer another", "Bearer", f"Basic {KEY}", KEY, "Bearer \u00e9"])
def test_without_the_key_nothing_is_told(inside: Opener, given: str | None) -> None:
    server = inside(key=KEY)
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    for response in (
        server.post(question(), headers=headers),
        server.get("/v1/models", headers=headers),
        server.get("/metrics", headers=headers),
        server.get("/openapi.json", headers=headers),
        server.get("/nothing", headers=headers),
    ):
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert server.get("/health", headers=headers).status_code == 200


def test_with_the_key_all_is_there(inside: Opener) -> None:
    server, headers = inside(key=KEY), {"Authorization": f"Bearer {KEY}"}
    assert server.post(question(), headers=headers).status_code == 200
    assert server.get("/v1/models", headers=headers).json()["data"][0]["id"] == "tiny"
    assert server.get("/v1/models/tiny", headers=headers).json()["object"] == "model"
    assert server.get("/v1/models/other", headers=headers).status_code == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("127.3.2.1:80", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST.", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("10.0.0.1", 403),
        ("", 403),
    ],
)
def test_a_page_from_elsewhere_cannot_ask_under_its_own_name(inside: Opener, host: str, status: int) -> None:
    response = inside(hosts=["localhost"]).get("/v1/models", headers={"Host": host})
    assert response.status_code == status


def test_no_other_page_may_read_answers(inside: Opener) -> None:
    server = inside()
    origin = {"Origin": "https://evil.example"}
    assert "access-control-allow-origin" not in server.post(question(), headers=origin).headers
    # A body of a kind that browsers send without asking first.
    response = server.post(question(), headers=origin | {"Content-Type": "text/plain"})
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "invalid_content_type"


def test_what_is_not_there_is_told_in_the_same_shape(inside: Opener) -> None:
    server = inside()
    assert server.get("/v1/embeddings").json()["error"]["type"] == "not_found_error"
    response = server.get("/v1/chat/completions")
    assert (response.status_code, response.json()["error"]["type"]) == (405, "invalid_request_error")
    assert server.get("/docs").status_code == 404


def test_a_body_is_bounded_as_announced_and_as_it_comes(inside: Opener) -> None:
    server = inside(limits=Limits(max_body=2000, seconds=SECONDS))
    large = json.dumps(question("a" * 5000)).encode()

    async def piecewise() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 100):
            yield large[start : start + 100]

    assert server.post(large).status_code == 413
    headers = {"Content-Type": "application/json"}
    response = asyncio.run(server.send("POST", "/v1/chat/completions", content=piecewise(), headers=headers))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert server.post(question()).status_code == 200


async def drive(
    server: Inside, body: bytes, *, more_body: bool = False, gone: asyncio.Event | None = None
) -> list[Any]:
    """One request as a server would bring it; its client goes away when `gone` is set. What was sent back."""
    sent: list[Any] = []
    first = [{"type": "http.request", "body": body, "more_body": more_body}]

    async def receive() -> Any:
        if first:
            return first.pop()
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }
    await server.gate(scope, receive, send)
    return sent


def test_a_slow_upload_ends(inside: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svcli.server.gate._LINGER_SECONDS", 0.05)
    server = inside(limits=Limits(upload_seconds=0.05))

    async def run() -> list[Any]:
        return await asyncio.wait_for(drive(server, b"{", more_body=True), SECONDS)

    assert asyncio.run(run())[0]["status"] == 408


async def until(condition: Any) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), SECONDS)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_slot(inside: Opener, processor: Processor, stream: bool) -> None:
    limits = Limits(seconds=SECONDS, max_tokens=9_000)
    server = inside([Speaker(processor, None)], limits)

    async def run() -> list[Any]:
        gone = asyncio.Event()
        body = json.dumps(question(stream=stream)).encode()
        asking = asyncio.ensure_future(drive(server, body, gone=gone))
        await until(lambda: server.served.scheduler.load().num_running == 1)
        gone.set()
        sent = await asking
        await until(lambda: server.served.scheduler.load().num_running == 0)
        return sent

    sent = asyncio.run(run())
    assert not any(message["type"] == "http.response.body" and not message.get("more_body") for message in sent)
    assert 'svcli_requests_total{path="/v1/chat/completions",status="499"} 1.0' in server.metrics.text().decode()
    assert server.post(question(max_tokens=2)).status_code == 200


def test_a_full_queue_says_when_to_come_again(inside: Opener, processor: Processor, gate: threading.Event) -> None:
    server = inside([Gated(processor, gate)], Limits(seconds=SECONDS, max_tokens=2), queue=1)

    async def run() -> list[Any]:
        load = server.served.scheduler.load
        body = json.dumps(question()).encode()
        first = asyncio.ensure_future(drive(server, body))
        await until(lambda: load().num_running == 1)
        second = asyncio.ensure_future(drive(server, body))
        await until(lambda: load().num_waiting == 1)
        third = await server.send("POST", "/v1/chat/completions", json=question())
        gate.set()
        await asyncio.gather(first, second)
        return [third, first.result()[0]["status"], second.result()[0]["status"]]

    third, *statuses = asyncio.run(run())
    assert statuses == [200, 200]
    assert (third.status_code, third.headers["Retry-After"]) == (429, "1")
    assert third.json()["error"]["code"] == "queue_full"


def test_no_more_are_let_in_than_can_be_held(inside: Opener, processor: Processor, gate: threading.Event) -> None:
    server = inside([Gated(processor, gate)], Limits(seconds=SECONDS, max_tokens=2, max_calls=1))

    async def run() -> tuple[int, int]:
        first = asyncio.ensure_future(drive(server, json.dumps(question()).encode()))
        await until(lambda: server.served.scheduler.load().num_running == 1)
        second = await server.send("POST", "/v1/chat/completions", json=question())
        health = await server.send("GET", "/health")
        gate.set()
        await first
        return second.status_code, health.status_code

    assert asyncio.run(run()) == (429, 200)
    assert server.post(question()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_late_is_told_so(inside: Opener, processor: Processor, stream: bool) -> None:
    server = inside([Speaker(processor, None)], Limits(seconds=0.2, max_tokens=1_000_000))
    response = server.post(question(stream=stream))
    if stream:  # the status was out when time ran out
        *_, last = [line for line in response.text.split("\n\n") if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    else:
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")


class Failing(Speaker):
    """An engine that breaks, and says where it lies."""

    def append(self, *_arguments: Any) -> Any:
        raise EngineError("no memory in /home/somebody/bundle")


def test_a_failing_engine_tells_its_secrets_to_the_log_alone(
    inside: Opener, processor: Processor, caplog: pytest.LogCaptureFixture
) -> None:
    server = inside([Failing(processor)])
    for stream in (False, True):
        response = server.post(question(stream=stream))
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        assert "somebody" not in response.text
    assert "somebody" in caplog.text


def test_a_stream_that_breaks_off_ends_with_what_went_wrong(inside: Opener, processor: Processor) -> None:
    class Breaking(Several):
        def step(self, new_ids: Mapping[int, int]) -> dict[int, Logits]:
            if len(self.steps) == 2:
                raise EngineError("the device in /dev is gone")
            return super().step(new_ids)

    server = inside(pool=Breaking([Speaker(processor, None)]))
    response = server.post(question(stream=True))
    *pieces, last = [line for line in response.text.split("\n\n") if line]
    assert response.status_code == 200
    assert len(pieces) > 1
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "/dev" not in response.text


def test_health_is_what_the_scheduler_is(inside: Opener) -> None:
    server = inside()
    response = server.get("/health")
    assert response.status_code == 200
    assert response.json() == {"alive": True, "ready": True, "waiting": 0, "running": 0, "slots": 1}
    server.served.scheduler.close()
    response = server.get("/health")
    assert (response.status_code, response.json()["ready"]) == (503, False)
    response = server.post(question())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_scheduler_that_died_is_not_healthy(inside: Opener, processor: Processor) -> None:
    class Dying(Several):
        def step(self, new_ids: Mapping[int, int]) -> dict[int, Logits]:
            raise KeyboardInterrupt(new_ids)

    server = inside(pool=Dying([Speaker(processor)]))
    assert server.post(question()).status_code == 500
    asyncio.run(until(lambda: not server.served.scheduler.load().alive))
    response = server.get("/health")
    assert (response.status_code, response.json()["alive"]) == (503, False)


def test_prometheus_can_count(inside: Opener) -> None:
    server = inside()
    server.post(question())
    server.post(question(n=2))
    server.get("/made/up/path")
    lines = server.get("/metrics").text.splitlines()
    assert 'svcli_requests_total{path="/v1/chat/completions",status="200"} 1.0' in lines
    assert 'svcli_requests_total{path="/v1/chat/completions",status="400"} 1.0' in lines
    assert 'svcli_requests_total{path="other",status="404"} 1.0' in lines
    assert 'svcli_completion_tokens_total{model="tiny"} 4.0' in lines
    assert 'svcli_time_to_first_token_seconds_count{model="tiny"} 1.0' in lines
    assert 'svcli_kv_bytes_reserved{model="tiny"} 100000.0' in lines
    assert 'svcli_queue_length{model="tiny"} 0.0' in lines
    assert 'svcli_alive{model="tiny"} 1.0' in lines


def test_a_line_is_logged_for_each_request(inside: Opener, caplog: pytest.LogCaptureFixture) -> None:
    server = inside()
    with caplog.at_level(logging.INFO, "svcli.server"):
        server.post(question())
        server.get("/a%0Ab%1b[31m")
    answered, missing = (record.getMessage() for record in caplog.records)
    assert answered.startswith("POST /v1/chat/completions 200 6+4 tokens ")
    assert missing.startswith("GET /a%0Ab%1B%5B31m 404 ")
