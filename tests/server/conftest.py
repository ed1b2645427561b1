"""The bundled model's processor, servers without a socket, and real ones on loopback."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from svcli.server.app import make_app
from svcli.server.gate import Gate
from svcli.server.limits import Limits
from svcli.server.metrics import Metrics
from svcli.server.served import Readers, Served
from svcli.settings import bundled_model
from svcli_engines.base import Engine, Logits
from svcli_engines.pictures import VisualCache
from svcli_engines.processor import Processor
from svcli_engines.schedule import Scheduler
from svcli_export.chat import Message
from svcli_export.manifest import MANIFEST_FILE, load_manifest
from tests.engines.test_generate import Scripted
from tests.engines.test_schedule import Several

ROOT = Path(__file__).parents[2]
NAME = "tiny"
END = 4
SECONDS = 120.0
"""Longer than anything here takes, however busy the machine is."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections lead to this machine alone."""
    connect = socket.socket.connect

    def refuse(this: socket.socket, address: Any) -> None:
        if this.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
            raise AssertionError(f"a test tried to connect to {address}")
        connect(this, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def processor() -> Processor:
    return Processor(bundled_model(), load_manifest(bundled_model(), quick=True))


def question(text: str = "what is this?", **options: Any) -> dict[str, Any]:
    """A request."""
    return {"model": NAME, "messages": [{"role": "user", "content": text}], **options}


@dataclass
class Inside:
    """A server without a socket."""

    gate: Gate
    served: Served
    metrics: Metrics

    def post(self, body: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        """`body`: bytes, or what is written as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        return asyncio.run(self.send("POST", path, content=content, headers=headers, **options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self.send("GET", path, **options))

    async def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.gate)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)


class Speaker(Scripted):
    """Says the same text whenever it is asked, or no end of it."""

    def __init__(self, processor: Processor, text: str | None = "a red ball.") -> None:
        self.text_ids = processor.prompt([Message("user", text or "a")]).ids[1:-1]
        self.endless, self.num_tokens = text is None, processor.config.text.vocab_size
        super().__init__(iter(()), capacity=10_000)

    def rewind(self, num_rows: int, next_position: int) -> None:
        super().rewind(num_rows, next_position)
        self._tokens = self._said()

    def _next(self) -> Logits:
        logits = np.zeros(self.num_tokens, np.float32)
        logits[next(self._tokens)] = 5
        return logits

    def _said(self) -> Iterator[int]:
        while True:
            yield from self.text_ids
            if not self.endless:
                yield END


Opener = Callable[..., Inside]


@pytest.fixture
def inside(processor: Processor) -> Iterator[Opener]:
    """Opens servers; closes them."""
    with ExitStack() as closing:

        def open_server(
            slots: Iterable[Engine] | None = None,
            limits: Limits | None = None,
            *,
            queue: int = 8,
            pool: Several | None = None,
            **options: Any,
        ) -> Inside:
            limits = limits or Limits(seconds=SECONDS)
            pool = pool or Several(list(slots or [Speaker(processor)]))
            visuals = VisualCache()
            scheduler = Scheduler(pool, processor, max_waiting=queue, visuals=visuals)
            closing.callback(scheduler.close)
            served = Served(NAME, processor, scheduler, visuals)
            models = {NAME: served}
            metrics, readers = Metrics(models), Readers(limits)
            closing.callback(readers.close)
            app = make_app(models, limits, metrics, readers)
            return Inside(Gate(app, limits, count=metrics.count_request, **options), served, metrics)

        yield open_server


@dataclass
class Process:
    """`svcli serve` as people start it."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str]
    """What it said on stderr; complete when it has ended."""
    listening: threading.Thread

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """The exit code."""
        self.process.send_signal(number)
        code = self.process.wait(SECONDS)
        self.listening.join(SECONDS)
        return code


@contextmanager
def serving(*options: str | Path, first: str = "", **environment: str) -> Iterator[Process]:
    """The bundled model on a free port of loopback; `first`: Python that runs before."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "export", "engines"))
    environ = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    program = f"{first}\nfrom svcli.__main__ import main; main()"
    command = [sys.executable, "-c", program, "serve", "--port", "0", "--threads", "1", *map(str, options)]
    started = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    assert started.stderr is not None
    lines = [started.stderr.readline()]
    found = re.match(r"(http://\S+)/v1 serves ", lines[0])
    listening = threading.Thread(target=lambda: lines.extend(started.stderr or ()))
    listening.start()
    try:
        assert found, lines
        yield Process(started, found[1], lines, listening)
    finally:
        started.kill()
        started.wait(SECONDS)
        listening.join(SECONDS)
        started.stderr.close()


def slowly(seconds: float) -> str:
    """For `serving`: so much longer takes each step, so that an answer is not over before a test has looked."""
    return f"""
import time
from svcli_engines.onnx_engine import OnnxPool
step = OnnxPool.step
OnnxPool.step = lambda pool, new_ids: (time.sleep({seconds}), step(pool, new_ids))[1]
"""


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, but that nothing it says ends its answer before its context is full."""
    folder = tmp_path_factory.mktemp("endless") / NAME
    shutil.copytree(bundled_model(), folder)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["chat"]["stop_ids"] = [manifest["chat"]["image_id"]]  # which is never said
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="session")
def server() -> Iterator[Process]:
    """One for all tests that leave it as it is."""
    with serving("--parallel", "2", "--queue", "4") as process:
        yield process


def events(text: str) -> list[dict[str, Any]]:
    """Of a stream that has come to its end."""
    *lines, last = [line for line in text.split("\n\n") if line]
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]
