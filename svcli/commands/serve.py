"""`svcli serve`: a bundle behind an interface that other programs speak."""

from __future__ import annotations

import ipaddress
import logging
import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svcli import ui
from svcli.answer_options import (
    BundleArgument,
    Drain,
    Engine,
    MaxPixels,
    MaxTokens,
    Parallel,
    Queue,
    Threads,
    Timeout,
)
from svcli.engines import EngineName
from svcli.errors import FAILURE, UsageError
from svcli.remarks import remarks
from svcli.server.keys import KEY_VARIABLE, read_key
from svcli.settings import bundled_model, debugging

if TYPE_CHECKING:
    from collections.abc import Mapping

    from svcli.server.served import Served


def serve(
    model: BundleArgument = None,
    host: Annotated[
        str, typer.Option(metavar="NAME", help="Address to listen on; others than this machine's own need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0: any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What requests call the model; its folder's name if left out.")
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant", metavar="V", help="A variant to serve beside it, as NAME:V, such as dense; repeatable."
        ),
    ] = None,
    engine: Engine = EngineName.ONNXRUNTIME,
    threads: Threads = None,
    parallel: Parallel = None,
    queue: Queue = 64,
    timeout: Timeout = 120.0,
    drain: Drain = 30.0,
    max_tokens: MaxTokens = 1024,
    max_body: Annotated[float, typer.Option(min=0.001, max=1024, metavar="MB", help="Largest request.")] = 32.0,
    max_pixels: MaxPixels = 50.0,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch pictures from public http(s) URLs that requests name.")
    ] = False,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help=f"Environment variable with the key that requests need; {KEY_VARIABLE} if set."
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with the key that requests need.")
    ] = None,
    no_key: Annotated[
        bool, typer.Option("--no-key", help="Listen on other addresses without a key: whoever reaches it may ask.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No line for each request.")] = False,
) -> None:
    """Serve a model to programs that speak OpenAI's chat completions.

    Requests are told on stderr. Ctrl-C or SIGTERM ends what was taken first; a second one ends at once.
    """
    key = read_key(api_key_env, api_key_file)
    _check_host(host, key, no_key)
    bundle = model or bundled_model()
    from svcli.server.app import make_app
    from svcli.server.gate import Gate
    from svcli.server.limits import Limits
    from svcli.server.metrics import Metrics
    from svcli.server.opening import open_models
    from svcli.server.run import address, bind, run
    from svcli.server.served import Readers
    from svcli_export.manifest import load_manifest

    _set_up_log(quiet)
    # In order of how long it takes to find out that it does not work.
    try:
        listener = bind(host, port)
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: {error.strerror or error}") from None
    with closing(listener):
        manifest = load_manifest(bundle, quick=True)
        if not quiet:
            for remark in remarks(manifest.config):
                ui.note(remark)
        models = open_models(
            bundle,
            manifest,
            name or bundle.resolve().name,
            variants or (),
            engine,
            threads=threads,
            parallel=parallel,
            max_waiting=queue,
        )
        schedulers = [each.scheduler for each in models.values()]
        limits = Limits(
            max_body=int(max_body * 2**20),
            max_pixels=int(max_pixels * 1e6),
            max_tokens=max_tokens,
            seconds=timeout,
            max_calls=sum(scheduler.load().num_slots + queue for scheduler in schedulers),
            allow_urls=allow_urls,
        )
        metrics, readers = Metrics(models), Readers(limits, min(4, len(os.sched_getaffinity(0))))
        hosts = None if key or no_key else ("localhost", host.lower())
        app = make_app(models, limits, metrics, readers)
        gate = Gate(app, limits, key=key, hosts=hosts, count=metrics.count_request)
        url = address(listener)
        all_ended = run(gate, listener, schedulers, drain, lambda: _tell(url, models, key is not None))
        readers.close()
    if not all_ended:
        ui.error("answers were broken off: they took longer than --drain")
        raise typer.Exit(FAILURE)


def _check_host(host: str, key: str | None, no_key: bool) -> None:
    """Raises UsageError where others could ask, and nothing keeps them from it."""
    if key is not None or no_key or host == "localhost":
        return
    try:
        if ipaddress.ip_address(host).is_loopback:
            return
    except ValueError:
        pass
    raise UsageError(f"--host {host}: others can reach it; set a key in {KEY_VARIABLE}, or say --no-key")


def _set_up_log(quiet: bool) -> None:
    """A line for each request, on stderr; what uvicorn says only where somebody looks for a defect."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    handler.addFilter(_Printable())
    for name, level in (
        ("svcli.server", logging.DEBUG if debugging() else logging.WARNING if quiet else logging.INFO),
        ("uvicorn", logging.INFO if debugging() else logging.CRITICAL + 1),
    ):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


class _Printable(logging.Filter):
    """No line steers a terminal."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = ui.printable(record.getMessage()), ()
        return True


def _tell(url: str, models: Mapping[str, Served], needs_key: bool) -> None:
    loads = [model.scheduler.load() for model in models.values()]
    num_slots, reserved = sum(load.num_slots for load in loads), sum(load.kv_bytes_reserved for load in loads)
    slots = f"{num_slots} slot{'s' if num_slots > 1 else ''}"
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if needs_key else ""
    asked = f'{{"model": "{next(iter(models))}", "messages": [{{"role": "user", "content": "hello"}}]}}'
    ui.serving(
        f"{url}/v1 serves {', '.join(models)}: {slots}, {ui.size(reserved)} of KV cache reserved",
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{asked}'",
    )
