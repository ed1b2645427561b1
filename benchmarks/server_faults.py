"""What a server makes of clients that do wrong, go away, do not read, or find it killed.

    python -m benchmarks.server_faults [--malformed N] [--hang-ups N]

Starts `svcli serve` with the bundled model on a free port of loopback and treats it badly: requests that schemathesis
makes of its OpenAPI document to be wrong, bytes that are no HTTP, connections that end at any point, readers that do
not read, SIGTERM and SIGKILL under load. What must hold is asserted at the end of each part: no answer with a status of
500, no slot that stays taken, every answer that was begun ended or told as broken off, no memory, thread or file more
than before. Needs the extra `serve` and the development tools.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import openai
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks

from benchmarks.measuring import surroundings, write_results
from svcli.server.limits import MAX_NAME

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "server_faults.json"
MODEL = "skipvision-tiny"
PICTURE = "data:image/png;base64," + base64.b64encode((ROOT / "examples" / "hamburgers.png").read_bytes()).decode()
SECONDS = 60.0
WARM_UP = 200
"""Questions before memory is looked at: caches fill, and the allocator finds its size."""
GROWTH = 32 << 20
"""Bytes by which memory may differ, as allocators have it."""


class Server:
    """`svcli serve` as a process."""

    def __init__(self, *options: str) -> None:
        paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "export", "engines"))
        command = [sys.executable, "-m", "svcli", "serve", "--quiet", "--port", "0", "--threads", "1", *options]
        self.process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        found = re.match(r"(http://\S+)/v1 serves ", line := self.process.stderr.readline())
        assert found, line
        self.url = found[1]
        self.client: Any = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=SECONDS, max_retries=0)
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 0

    def ask(self, **options: Any) -> Any:
        """A question about a picture, by the official client."""
        content = [
            {"type": "image_url", "image_url": {"url": PICTURE}},
            {"type": "text", "text": "How many hamburgers are there?"},
        ]
        messages = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(model=MODEL, messages=messages, **options)

    def gauge(self, name: str) -> float:
        text = self.get("/metrics")
        return sum(float(value) for value in re.findall(rf"^svcli_{name}\{{.*\}} (\S+)$", text, re.MULTILINE))

    def get(self, path: str) -> str:
        with socket.create_connection(self.address, SECONDS) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()

    def size(self) -> dict[str, int]:
        of_process = Path(f"/proc/{self.process.pid}")
        facts = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", (of_process / "status").read_text(), re.MULTILINE))
        num_files = len(list((of_process / "fd").iterdir()))
        return {"bytes": int(facts["VmRSS"]) * 1024, "threads": int(facts["Threads"]), "files": num_files}

    def settle(self) -> None:
        """Until nobody is answered any more."""
        wait_until(lambda: self.gauge("running") == self.gauge("queue_length") == 0)


@contextmanager
def endless() -> Iterator[Path]:
    """The bundled model, but that nothing it says ends its answer before its context is full."""
    with TemporaryDirectory() as parent:
        folder = Path(parent) / MODEL
        shutil.copytree(ROOT / "models" / MODEL, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["chat"]["stop_ids"] = [manifest["chat"]["image_id"]]  # which is never said
        (folder / "manifest.json").write_text(json.dumps(manifest))
        yield folder


@contextmanager
def serving(*options: str) -> Iterator[Server]:
    server = Server(*options)
    try:
        yield server
    finally:
        server.client.close()
        server.process.kill()
        server.process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come to rest"
        time.sleep(0.05)


def malformed(server: Server, count: int) -> dict[str, Any]:
    """Requests that the OpenAPI document says are wrong; the checks of schemathesis hold for each."""
    load_all_checks()
    schema: Any = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    operations = [operation for operation in operations if operation.method == "post"]
    statuses: Counter[int] = Counter()
    for operation in operations:

        @seed(6)
        @settings(
            max_examples=count // len(operations),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
        def call(case: Any) -> None:
            model = case.body.get("model") if isinstance(case.body, dict) else None
            if isinstance(model, str) and len(model) <= MAX_NAME:  # or else its length is what is wrong
                case.body["model"] = MODEL
            statuses[case.call_and_validate().status_code] += 1

        call()
    assert not any(status >= 500 for status in statuses), statuses
    return {"requests": sum(statuses.values()), "statuses": {str(each): statuses[each] for each in sorted(statuses)}}


def garbage(server: Server, count: int) -> dict[str, int]:
    """Bytes that are no HTTP, or hardly."""
    draw = random.Random(0)
    starts = (
        b"",
        b"GET / HTTP/1.1\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 5\r\n\r\n",
        b"\x16\x03",
    )
    for _ in range(count):
        with socket.create_connection(server.address, SECONDS) as connection, suppress(OSError):
            connection.sendall(draw.choice(starts) + draw.randbytes(draw.randrange(2000)))
            connection.settimeout(0.01)
            connection.recv(1000)
    return {"connections": count}


def hang_ups(server: Server, count: int) -> dict[str, int]:
    """Clients that go away at any byte of a request, or at any of its answer."""
    body = json.dumps({"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "tell me more"}]})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    request = f"{head}Content-Type: application/json\r\n\r\n{body}".encode()

    def one(number: int) -> None:
        draw = random.Random(number)
        with suppress(OSError), socket.create_connection(server.address, SECONDS) as connection:
            whole = draw.random() < 0.7
            connection.sendall(request if whole else request[: draw.randrange(len(request))])
            connection.settimeout(draw.random() * 0.2)
            if whole and draw.random() < 0.8:
                connection.recv(draw.randrange(1, 2000))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(count)))
    return {"connections": count}


def slow_readers(server: Server, count: int) -> dict[str, float]:
    """Some who ask and never read, beside one who does."""
    body = json.dumps(
        {
            "model": MODEL,
            "stream": True,
            "max_tokens": 1000,
            "logprobs": True,
            "top_logprobs": 20,
            "messages": [{"role": "user", "content": "tell me more"}],
        }
    )
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    sleeping = []
    for _ in range(count):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(server.address)
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        sleeping.append(connection)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        assert server.ask(max_tokens=5).choices[0].message.content
        times.append(time.perf_counter() - started)
    server.settle()  # whether or not anybody reads
    for connection in sleeping:
        connection.close()
    return {"readers": count, "longest_answer_seconds": max(times)}


def ended(bundle: Path, number: signal.Signals, count: int) -> dict[str, Any]:
    """A signal while many are answered: what each client hears. None waits for ever."""
    with serving(str(bundle), "--queue", str(count), "--drain", "60") as server:
        heard: Counter[str] = Counter()

        def ask(_number: int) -> None:
            try:
                chunks = list(server.ask(stream=True, max_tokens=200))
                heard["ended" if chunks[-1].choices[0].finish_reason else "cut"] += 1
            except openai.APIStatusError as error:
                heard[f"refused with {error.status_code}"] += 1
            except openai.APIError as error:
                heard[type(error).__name__] += 1

        started = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            asking = pool.map(ask, range(count))
            wait_until(lambda: server.gauge("running") + server.gauge("queue_length") == count)
            server.process.send_signal(number)
            list(asking)
        seconds = time.perf_counter() - started
        code = server.process.wait(SECONDS)
    if number is signal.SIGTERM:
        assert heard == {"ended": count}, heard
        assert code == 0, code
    assert "cut" not in heard, heard
    return {"clients": count, "heard": dict(heard), "exit_code": code, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--malformed", type=int, default=10_000, metavar="N", help="requests")
    parser.add_argument("--garbage", type=int, default=1_000, metavar="N", help="connections")
    parser.add_argument("--hang-ups", type=int, default=2_000, metavar="N", help="connections")
    parser.add_argument("--slow", type=int, default=16, metavar="N", help="readers who do not read")
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="of a server that is ended")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with endless() as bundle, serving(str(bundle), "--parallel", "4", "--queue", "64", "--max-tokens", "300") as server:
        for _ in range(WARM_UP):
            server.ask(max_tokens=2)
        expected = server.ask(max_tokens=20).choices[0].message.content
        before = server.size()
        for name, part in (
            ("malformed", lambda: malformed(server, options.malformed)),
            ("garbage", lambda: garbage(server, options.garbage)),
            ("hang_ups", lambda: hang_ups(server, options.hang_ups)),
            ("slow_readers", lambda: slow_readers(server, options.slow)),
        ):
            started = time.perf_counter()
            found[name] = part()
            server.settle()
            assert server.ask(max_tokens=20).choices[0].message.content == expected
            found[name] |= {"seconds": time.perf_counter() - started, "size": server.size()}
            print(name, found[name])
        wait_until(lambda: server.size()["files"] <= before["files"] + 2)
        after = server.size()
        assert after["bytes"] <= before["bytes"] + GROWTH, (before, after)
        assert after["threads"] <= before["threads"] + 12, (before, after)  # readers that were not needed yet
        found["size"] = {"before": before, "after": after}
        assert server.process.poll() is None
    with endless() as bundle:
        for each in (signal.SIGTERM, signal.SIGKILL):
            found[each.name] = ended(bundle, each, options.clients)
            print(each.name, found[each.name])
    write_results(found | {"surroundings": surroundings(1)}, options.output)


if __name__ == "__main__":
    main()
