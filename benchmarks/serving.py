"""Loads `svcli serve` with many callers: a model with skipping, and the same dense, in the same memory for KV caches.

    python -m benchmarks.serving [runs/tiny/checkpoint] [--clients 1 4 16 64] [--budget-mib 8]
    python -m benchmarks.serving --soak 30

Both are exported with room for one question about one picture, and get as many slots as fit the budget. In every round
each server is loaded in turn, in an order that alternates, with pictures it has not seen before. Answers are of one
length. Callers run on the same machine, on loopback, and take cores from the server. `--soak` loads the skipping one
for so many minutes and notes the memory it holds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from benchmarks.measuring import BUNDLED, RESULTS, surroundings, write_results
from svcli.bench.cpu import available_cores
from svcli_export.bundle import export_bundle
from svcli_export.manifest import Manifest
from svcli_export.source import read_outline

VARIANTS = ("dense", "skipped")
RESULT = RESULTS / "serving.json"
_QUESTION = "describe the picture"
_TEXT_ROWS = 96
"""Rows of context beside the picture."""
_MOST_SLOTS = 64
_PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Server:
    """One that runs."""

    variant: str
    url: str
    process: psutil.Process
    manifest: Manifest
    num_slots: int


@dataclass
class Calls:
    """What callers have seen in some seconds."""

    seconds: float = 0.0
    first_token: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    num_tokens: int = 0
    refused: int = 0

    def add(self, other: Calls) -> None:
        self.seconds += other.seconds
        self.first_token += other.first_token
        self.whole += other.whole
        self.num_tokens += other.num_tokens
        self.refused += other.refused

    def told(self) -> dict[str, Any]:
        return {
            "answers": len(self.whole),
            "refused": self.refused,
            "answers_per_second": len(self.whole) / self.seconds,
            "tokens_per_second": self.num_tokens / self.seconds,
            "first_token": _percentiles(self.first_token),
            "whole": _percentiles(self.whole),
        }


def pictures(folder: Path) -> Iterator[str]:
    """data: URLs of crops of the example pictures, no two alike."""
    images = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
    random = np.random.default_rng(0)
    for image in itertools.cycle(images):
        width, height = (int(side * share) for side, share in zip(image.size, random.uniform(0.5, 1, 2), strict=True))
        left, top = (int(random.integers(0, room + 1)) for room in (image.width - width, image.height - height))
        buffer = io.BytesIO()
        image.crop((left, top, left + width, top + height)).save(buffer, "JPEG", quality=90)
        yield "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def export(source: Path, bundle: Path, variant: str) -> Manifest:
    """With room for one picture and a few words."""
    num_tokens = read_outline(source).config.num_tokens
    return export_bundle(
        source,
        bundle,
        max_images=1,
        max_context=num_tokens + _TEXT_ROWS,
        skip="off" if variant == "dense" else None,
        default_variants=False,
    )


@contextmanager
def serving(variant: str, bundle: Path, manifest: Manifest, num_slots: int, threads: int) -> Iterator[Server]:
    """`svcli serve` on a port of its own."""
    command = [sys.executable, "-m", "svcli", "serve", str(bundle), "--port", "0", "--parallel", str(num_slots)]
    command += ["--threads", str(threads), "--queue", "1000", "--timeout", "600", "--name", variant, "--quiet"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stderr=log, stdout=log, env=os.environ) as process,
    ):
        try:
            url = _address(log, process)
            yield Server(variant, url, psutil.Process(process.pid), manifest, num_slots)
        finally:
            process.terminate()


async def load(server: Server, shown: Iterator[str], num_clients: int, seconds: float, num_tokens: int) -> Calls:
    """`num_clients` callers who ask one thing after another; what is asked within `seconds` is waited for."""
    calls, started = Calls(), time.perf_counter()
    limits = httpx.Limits(max_connections=num_clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits, trust_env=False) as client:

        async def caller() -> None:
            while time.perf_counter() - started < seconds:
                await _ask(client, server.variant, next(shown), num_tokens, calls)

        await asyncio.gather(*(caller() for _ in range(num_clients)))
    calls.seconds = time.perf_counter() - started
    return calls


async def _ask(client: httpx.AsyncClient, model: str, picture: str, num_tokens: int, calls: Calls) -> None:
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": _QUESTION}]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": num_tokens,
        "min_tokens": num_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    asked, first = time.perf_counter(), 0.0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code == 429:
            calls.refused += 1
            return
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - asked
            if event.get("usage"):
                calls.num_tokens += event["usage"]["completion_tokens"]
    calls.first_token.append(first)
    calls.whole.append(time.perf_counter() - asked)


async def measure(servers: Sequence[Server], arguments: argparse.Namespace) -> dict[str, Any]:
    """Each server at each number of callers, in rounds that alternate."""
    shown = pictures(Path("examples"))
    for server in servers:
        await load(server, shown, 4, 3, arguments.tokens)  # graphs are opened, memory is taken
    found: dict[str, Any] = {}
    for num_clients in arguments.clients:
        calls = {server.variant: Calls() for server in servers}
        for number in range(arguments.rounds):
            for server in servers if number % 2 == 0 else reversed(servers):
                calls[server.variant].add(await load(server, shown, num_clients, arguments.seconds, arguments.tokens))
        told = {variant: each.told() for variant, each in calls.items()}
        skipped, dense = (told[each]["tokens_per_second"] for each in ("skipped", "dense"))
        found[str(num_clients)] = told | {"tokens_ratio": skipped / dense}
        print(f"{num_clients} callers: {dense:.1f} tok/s dense, {skipped:.1f} skipped")
    return found


async def soak(server: Server, minutes: float, num_tokens: int) -> dict[str, Any]:
    """Memory of the server's process through minutes of load: medians of each fifth, in MiB."""
    shown, memory = pictures(Path("examples")), []
    calls = Calls()
    for _ in range(max(10, int(minutes * 6))):
        calls.add(await load(server, shown, 8, 10, num_tokens))
        memory.append(server.process.memory_info().rss / 2**20)
    fifths = [float(np.median(part)) for part in np.array_split(memory, 5)]
    print(f"{calls.seconds / 60:.0f} min, {len(calls.whole)} answers; MiB in fifths: {fifths}")
    return {"minutes": calls.seconds / 60, "memory_mib": fifths, **calls.told()}


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {
        f"p{each}": float(value) for each, value in zip(_PERCENTILES, np.percentile(seconds, _PERCENTILES), strict=True)
    }


def _address(log: Any, process: subprocess.Popen[bytes]) -> str:
    """Where the server says that it listens."""
    for _ in range(600):
        log.seek(0)
        for word in log.read().split():
            if word.startswith("http://") and word.endswith("/v1"):
                return str(word.removesuffix("/v1"))
        if process.poll() is not None:
            break
        time.sleep(0.1)
    log.seek(0)
    raise SystemExit(f"the server did not start: {log.read()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", default=BUNDLED, help="a checkpoint or a bundle that skips")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each server in each round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--budget-mib", type=float, default=8.0, help="for the KV caches of each server")
    parser.add_argument("--soak", type=float, metavar="MINUTES")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    around = surroundings(arguments.threads)
    found: dict[str, Any] = json.loads(arguments.output.read_text("utf-8")) if arguments.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        servers = []
        for variant in VARIANTS[1 if arguments.soak else 0 :]:
            bundle = Path(folder) / variant
            manifest = export(arguments.source, bundle, variant)
            slot_bytes = manifest.contract.capacity * manifest.contract.kv_bytes_per_row
            num_slots = max(1, min(_MOST_SLOTS, int(arguments.budget_mib * 2**20 // slot_bytes)))
            servers.append(running.enter_context(serving(variant, bundle, manifest, num_slots, arguments.threads)))
        if arguments.soak:
            found["soak"] = around | asyncio.run(soak(servers[0], arguments.soak, arguments.tokens))
        else:
            found["load"] = around | {
                "tokens": arguments.tokens,
                "budget_mib": arguments.budget_mib,
                "rounds": arguments.rounds,
                "seconds": arguments.seconds,
                "slots": {server.variant: server.num_slots for server in servers},
                "rows": {server.variant: server.manifest.contract.capacity for server in servers},
                "clients": asyncio.run(measure(servers, arguments)),
            }
    write_results(found, arguments.output)


if __name__ == "__main__":
    main()
