"""The bundled model in two replicas of Ray Serve on loopback, which are killed while they answer."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import httpx
import psutil
import pytest

from tests.optional import missing
from tests.server.conftest import ROOT, events
from tests.server.test_serve import asked, said_by_chat

CONFIG = ROOT / "examples" / "ray_serve" / "serve.yaml"
MODEL = "skipvision-tiny"
SECONDS = 90.0
"""Longer than Ray takes for anything here, such as starting a replica, however busy the machine is."""
NUM_REPLICAS, MAX_ONGOING, QUEUE = 2, 6, 8
NUM_LET_IN = NUM_REPLICAS * MAX_ONGOING + QUEUE
# `serve run CONFIG`, but that Ray itself is on loopback alone, takes little, and tells metrics every second.
START = """
import sys, ray
from ray.serve.scripts import cli
_, folder, config, metrics_port = sys.argv
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, namespace="serve",
         _node_ip_address="127.0.0.1", _temp_dir=folder, _metrics_export_port=int(metrics_port),
         _system_config={"metrics_report_interval_ms": 1000})
cli(["run", config])
"""
QUESTIONS = ("How many hamburgers are there?", "What is this?", "How many kangaroos are there?")
PICTURES = ("hamburgers.png", "kangaroos.png")
Said = tuple[str, int]
"""The text of an answer, and how many tokens it has."""


@dataclass
class Cluster:
    """Ray, and what runs in it."""

    process: subprocess.Popen[str]
    url: str
    metrics_url: str
    lines: list[str] = field(default_factory=list)
    """What it has said so far."""

    def said(self, pattern: str) -> list[str]:
        return [found[0] for line in [*self.lines] for found in [re.search(pattern, line)] if found]

    def processes(self) -> list[psutil.Process]:
        started = psutil.Process(self.process.pid)
        return [started, *started.children(recursive=True)]

    def replicas(self) -> set[int]:
        """Process ids of those that are alive and have opened the model."""
        opened = {int(found.split("=")[1]) for found in self.said(r"pid=\d+(?=.* serves skipvision-tiny: )")}
        return opened & {each.pid for each in self.processes() if is_running(each)}

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, "".join(self.lines[-50:])
            assert self.process.poll() is None, "".join(self.lines[-50:])
            time.sleep(0.1)

    def is_whole(self) -> bool:
        """Whether all replicas are there, and a question would be taken."""
        if len(self.replicas()) < NUM_REPLICAS:
            return False
        try:
            return httpx.get(f"{self.url}/health", timeout=SECONDS).status_code == 200
        except httpx.TransportError:
            return False


def is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def config(port: int) -> str:
    """The example's, smaller."""
    text = CONFIG.read_text()
    for old, new in (
        ("port: 8000\n", f"port: {port}\n"),
        ("max_ongoing: 16 ", f"max_ongoing: {MAX_ONGOING} "),
        ("queue: 64 ", f"queue: {QUEUE} "),
        ("parallel: 4 ", "parallel: 3 "),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if find_spec("ray") is None:
        missing("ray")
    port, metrics_port = free_ports(2)
    # Paths of sockets are short; pytest's folders are not.
    with tempfile.TemporaryDirectory(prefix="svcli-ray-", ignore_cleanup_errors=True) as folder:
        path = f"{folder}/serve.yaml"
        with open(path, "w") as file:
            file.write(config(port))
        paths = os.pathsep.join(str(ROOT / each) for each in ("", "export", "engines"))
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SVCLI_"))},
            "HOME": folder,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": paths,
            "PYTHONUNBUFFERED": "1",
            "RAY_DEDUP_LOGS": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [sys.executable, "-c", START, folder, path, str(metrics_port)]
        process = subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        cluster = Cluster(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics")
        listening = threading.Thread(target=lambda: cluster.lines.extend(process.stdout or ()))
        listening.start()
        try:
            cluster.wait_until(cluster.is_whole)
            yield cluster
        finally:
            left = end(cluster)
            listening.join(SECONDS)
            assert process.stdout is not None
            process.stdout.close()
        assert not left


def end(cluster: Cluster) -> list[psutil.Process]:
    """Ends all of it; the processes that did not end by themselves."""
    processes = cluster.processes() if cluster.process.poll() is None else []
    cluster.process.send_signal(signal.SIGINT)
    _, left = psutil.wait_procs(processes, SECONDS)
    for each in left:
        each.kill()
    cluster.process.wait(SECONDS)
    return list(left)


def question(number: int, **options: Any) -> dict[str, Any]:
    """About a picture, to which the likeliest answer is by far the likeliest."""
    text, picture = QUESTIONS[number % len(QUESTIONS)], PICTURES[number % len(PICTURES)]
    messages = asked(text, ROOT / "examples" / picture)
    return {"model": MODEL, "messages": messages, "max_tokens": 40, "logprobs": True, **options}


def many(**options: Any) -> list[dict[str, Any]]:
    """As many as are let in; every third is no stream."""
    return [question(number, stream=number % 3 != 0, **options) for number in range(NUM_LET_IN)]


SPECIAL = ("<pad>", "<image>", "<user>", "<assistant>", "<end>")
LONG = {"temperature": 1.0, "min_tokens": 80, "max_tokens": 80}
"""80 tokens of chance: not the same each time, since arithmetic differs in its last bits with what else is answered."""


@dataclass
class Callers:
    """Ask all at once."""

    url: str
    num_events: int = 0
    """That all streams together have brought."""

    def ask(
        self, questions: Sequence[dict[str, Any]], meanwhile: Callable[[], None] | None = None, after: int = 3
    ) -> list[Said]:
        """`meanwhile` runs when all streams together have brought so many events."""
        self.num_events = 0

        async def interfere() -> None:
            deadline = time.monotonic() + SECONDS
            while meanwhile and self.num_events < after:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.005)
            if meanwhile:
                meanwhile()

        async def ask_all() -> list[Said]:
            async with httpx.AsyncClient(timeout=SECONDS, limits=httpx.Limits()) as client:
                asking = [self._ask(client, each) for each in questions]
                *answers, _ = await asyncio.gather(*asking, interfere())
                return answers  # type: ignore[return-value]

        return asyncio.run(ask_all())

    async def _ask(self, client: httpx.AsyncClient, asks: dict[str, Any]) -> Said:
        async with client.stream("POST", f"{self.url}/v1/chat/completions", json=asks) as response:
            parts = []
            async for part in response.aiter_text():
                parts.append(part)
                self.num_events += part.count("data: ")
        text = "".join(parts)
        assert response.status_code == 200, text
        if not asks.get("stream"):
            answer = json.loads(text)
            choice = answer["choices"][0]
            return choice["message"]["content"], len(choice["logprobs"]["content"])
        return said_in(events(text))


def said_in(chunks: Iterable[dict[str, Any]]) -> Said:
    chunks = list(chunks)
    assert not any("error" in each for each in chunks)
    assert len({(each["id"], each["created"]) for each in chunks}) == 1
    choices = [each["choices"][0] for each in chunks]
    text = "".join(each["delta"].get("content", "") for each in choices)
    told = [token for each in choices if each["logprobs"] for token in each["logprobs"]["content"]]
    if all(token["bytes"] is not None for token in told):  # or else some are parts of a letter
        # Chance draws special tokens now and then, which have a name and no text.
        assert "".join(token["token"] for token in told if token["token"] not in SPECIAL) == text, repr(text)
    assert [each["delta"] for each in choices].count({"role": "assistant", "content": ""}) == 1
    return text, len(told)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[Said]:
    """Answers to `many`, each alone."""
    callers = Callers(cluster.url)
    return [callers.ask([{**each, "stream": False}])[0] for each in many()]


@pytest.mark.slow
def test_replicas_say_what_chat_says(cluster: Cluster) -> None:
    asks = {"model": MODEL, "messages": asked(), "logprobs": True, "max_tokens": 40}
    expected = said_by_chat()
    assert {text for text, _ in Callers(cluster.url).ask([asks, {**asks, "stream": True}] * 4)} == {expected}
    answered = r"Model pid=\d+(?=.* POST /v1/chat/completions 200 )"
    cluster.wait_until(lambda: len(set(cluster.said(answered))) == NUM_REPLICAS)


@pytest.mark.slow
def test_no_request_is_lost_when_a_replica_is_killed_under_load(cluster: Cluster, undisturbed: list[Said]) -> None:
    for _ in range(5):  # the one that is killed may just have answered all that it had
        killed = min(cluster.replicas())
        answers = Callers(cluster.url).ask(many(), partial(os.kill, killed, signal.SIGKILL))
        assert answers == undisturbed
        cluster.wait_until(cluster.is_whole)
        assert killed not in cluster.replicas()
        if cluster.said("asking again"):
            return
    pytest.fail("no replica ever had a request when it was killed")


@pytest.mark.slow
def test_no_request_is_lost_when_all_replicas_are_killed_under_load(cluster: Cluster, undisturbed: list[Said]) -> None:
    cluster.wait_until(cluster.is_whole)

    def kill() -> None:
        for each in cluster.replicas():
            os.kill(each, signal.SIGKILL)

    assert Callers(cluster.url).ask(many(), kill) == undisturbed
    cluster.wait_until(cluster.is_whole)


@pytest.mark.slow
def test_streams_of_chance_go_on_behind_what_was_told(cluster: Cluster) -> None:
    cluster.wait_until(cluster.is_whole)
    pattern = "asking again, behind [1-9]"
    num_repeats = len(cluster.said(pattern))
    for _ in range(5):  # the one that is killed may just have answered all that it had
        victim = max(cluster.replicas())
        answers = Callers(cluster.url).ask(many(**LONG), partial(os.kill, victim, signal.SIGKILL), after=300)
        assert {num_tokens for _, num_tokens in answers} == {80}
        assert len({text for text, _ in answers}) == NUM_LET_IN
        cluster.wait_until(cluster.is_whole)
        if len(cluster.said(pattern)) > num_repeats:
            return
    pytest.fail("no replica ever had begun a stream when it was killed")


@pytest.mark.slow
def test_more_than_there_is_room_for_is_refused_at_once(cluster: Cluster) -> None:
    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=SECONDS, limits=httpx.Limits()) as client:
            url = f"{cluster.url}/v1/chat/completions"
            return await asyncio.gather(*(client.post(url, json=each) for each in [*many(**LONG), *many(**LONG)]))

    answers = asyncio.run(ask_all())
    refused = [each for each in answers if each.status_code != 200]
    assert 0 < len(refused) <= NUM_LET_IN
    assert {(each.status_code, each.json()["error"]["code"], each.headers["retry-after"]) for each in refused} == {
        (429, "queue_full", "1")
    }


@pytest.mark.slow
def test_a_client_that_hangs_up_frees_its_slot_in_a_replica(cluster: Cluster) -> None:
    def num_gone(of: str) -> int:
        return len(cluster.said(rf"{of} pid=.* POST /v1/chat/completions (499|.*broken off)"))

    async def hang_up(client: httpx.AsyncClient) -> None:
        asks = question(1, stream=True, messages=asked(picture=None), min_tokens=180, max_tokens=180)
        async with client.stream("POST", f"{cluster.url}/v1/chat/completions", json=asks) as response:
            await anext(response.aiter_text())

    async def hang_up_all() -> None:
        async with httpx.AsyncClient(timeout=SECONDS) as client:
            await asyncio.gather(*(hang_up(client) for _ in range(NUM_REPLICAS * 3)))

    asyncio.run(hang_up_all())
    # Some may have been answered before they were known to be gone.
    cluster.wait_until(lambda: all(num_gone(of) >= NUM_REPLICAS for of in ("Router", "Model")))


@pytest.mark.slow
def test_routes_and_refusals_are_those_of_the_server(cluster: Cluster) -> None:
    with httpx.Client(base_url=cluster.url, timeout=SECONDS) as client:
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == [MODEL]
        assert "/v1/svcli/look" in client.get("/openapi.json").json()["paths"]
        assert client.get("/").text.startswith("<!DOCTYPE html>")
        assert client.get("/health").json()["ready"] is True
        wrong = client.post("/v1/chat/completions", json={"model": "other", "messages": asked()})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")
        wrong = client.post("/v1/chat/completions", json={"model": MODEL, "messages": asked(), "n": 2})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "n")
        wrong = client.get("/v1/models", headers={"Host": "elsewhere.example"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (403, "host_not_allowed")
        wrong = client.get("/metrics")
        assert (wrong.status_code, "Ray" in wrong.json()["error"]["message"]) == (404, True)


@pytest.mark.slow
def test_ray_exports_the_metrics_of_every_replica(cluster: Cluster) -> None:
    def counted() -> dict[str, float]:
        text = httpx.get(cluster.metrics_url, timeout=SECONDS).text
        found = re.findall(r'^ray_svcli_answers_total\{.*?replica="(.*?)".*?\} (\S+)$', text, re.MULTILINE)
        return {replica: float(number) for replica, number in found}

    Callers(cluster.url).ask(many())
    cluster.wait_until(lambda: sum(number > 0 for number in counted().values()) >= NUM_REPLICAS)
    text = httpx.get(cluster.metrics_url, timeout=SECONDS).text
    for name in ("kv_bytes_used", "time_to_first_token_seconds_bucket", "requests", "repeats"):
        assert f"ray_svcli_{name}" in text
