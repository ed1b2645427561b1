"""Several replicas of a model behind one address, with Ray Serve: `serve run svcli.server.ray_serve:app`.

    client ─▶ Ray's proxy ─▶ Router ─▶ Ray's handle ─▶ Model (several)
                             Gate                      Gate ─▶ app, as in `svcli serve`

A Router holds each request until it is answered as a whole, and asks again where a Model dies.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve import metrics as ray_metrics
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from starlette.types import ASGIApp, Receive, Scope, Send

from svcli.engines import EngineName
from svcli.remarks import remarks
from svcli.server.app import make_app
from svcli.server.calls import Identity
from svcli.server.gate import Gate
from svcli.server.keys import read_key
from svcli.server.limits import Limits
from svcli.server.metrics import Metrics
from svcli.server.opening import open_models
from svcli.server.problems import RETRY_SECONDS, Problem
from svcli.server.ray_metrics import Mirror
from svcli.server.relay import OtherAnswerError, Relay, Sent, messages_of
from svcli.server.replies import event
from svcli.server.served import Readers
from svcli.settings import bundled_model
from svcli_export.manifest import load_manifest

_LOST = (
    DeploymentUnavailableError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    ReplicaUnavailableError,
    WorkerCrashedError,
)
"""What says that who was asked does not answer any more; a defect of ours is none of them."""
_MOST_TRIES = 8
"""A request that kills whoever answers it must come to an end."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
"""Seconds before a request is asked again; each pause is twice the one before."""
_LAST_WORDS_SECONDS = 5.0
"""For a replica to say itself that it took too long."""
_HEALTH_SECONDS = 5.0
_PASSED_ON = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")
_log = logging.getLogger("svcli.server")


def _listed(given: Any) -> Any:
    return tuple(given.split(",")) if isinstance(given, str) else given


class Options(BaseModel):
    """What `serve run svcli.server.ray_serve:app NAME=VALUE ...` takes, and `args` of a configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: Path | None = Field(None, description="Bundle folder, on every node; the bundled model if left out.")
    name: str | None = Field(None, description="What requests call the model; its folder's name if left out.")
    variants: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        (), description="To serve beside it, as NAME:V; several with commas."
    )
    engine: EngineName = EngineName.ONNXRUNTIME
    replicas: int = Field(2, ge=1)
    routers: int = Field(1, ge=1, description="Each holds requests of its own; one that dies loses them.")
    cpus: float = Field(1, ge=0, description="That Ray sets aside for each replica.")
    gpus: float = Field(0, ge=0, description="The same.")
    threads: int | None = Field(None, ge=1, description="Of each replica on onnxruntime; as many as `cpus`.")
    parallel: int | None = Field(None, ge=1, le=1024, description="Answers at a time of each replica.")
    max_ongoing: int = Field(16, ge=1, description="Requests at one replica, those included that wait for a slot.")
    queue: int = Field(64, ge=0, description="Requests that may wait beside these; more are refused with 429.")
    timeout: float = Field(120, ge=0.1, description="Seconds for one answer, waiting and asking again included.")
    drain: float = Field(30, ge=0, description="Seconds for ending what was taken, when a replica is stopped.")
    max_tokens: int = Field(1024, ge=1, description="Longest answer.")
    max_body: float = Field(32, gt=0, le=1024, description="Largest request, in MB.")
    max_pixels: float = Field(50, gt=0, le=100, description="Largest picture, in megapixels.")
    allow_urls: bool = Field(False, description="Fetch pictures from public http(s) URLs that requests name.")
    api_key_env: str | None = Field(None, description="Environment variable of the Router with the key.")
    api_key_file: Path | None = Field(None, description="File with the key, where the Router runs.")
    no_key: bool = Field(False, description="Requests from other machines need no key.")

    @property
    def limits(self) -> Limits:
        """What one Router lets in, so that all of them take what replicas and queue have room for."""
        num_calls = -(-(self.replicas * self.max_ongoing + self.queue) // self.routers)
        return Limits(
            max_body=int(self.max_body * 2**20),
            max_pixels=int(self.max_pixels * 1e6),
            max_tokens=self.max_tokens,
            seconds=self.timeout,
            max_calls=num_calls,
            allow_urls=self.allow_urls,
        )


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """The application that `serve run` and `serve deploy` look for. Raises pydantic's ValidationError."""
    options = Options.model_validate(arguments)
    common = {"graceful_shutdown_timeout_s": options.drain, "health_check_period_s": _HEALTH_SECONDS}
    models = serve.deployment(
        name="Model",
        num_replicas=options.replicas,
        max_ongoing_requests=options.max_ongoing,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        **common,
    )(Model)
    routers = serve.deployment(
        name="Router",
        num_replicas=options.routers,
        # Gate refuses what is too much, and must be reached for that.
        max_ongoing_requests=2 * options.limits.max_calls + 100,
        ray_actor_options={"num_cpus": 0},
        **common,
    )(serve.ingress()(Router))
    return routers.bind(options, models.bind(options))


class Model:
    """A replica: the application of `svcli serve` in a process of its own, spoken to in messages of ASGI."""

    def __init__(self, options: Options) -> None:
        _set_up_log()
        bundle = options.bundle or bundled_model()
        manifest = load_manifest(bundle, quick=True)
        for remark in remarks(manifest.config):
            _log.warning(remark)
        is_onnxruntime = options.engine in (EngineName.ONNXRUNTIME, EngineName.ONNXRUNTIME_CUDA)
        models = open_models(
            bundle,
            manifest,
            options.name or bundle.resolve().name,
            options.variants,
            options.engine,
            threads=options.threads or (max(1, int(options.cpus)) if is_onnxruntime else None),
            parallel=options.parallel,
            max_waiting=options.max_ongoing,  # Ray sends no more
        )
        self._schedulers = [model.scheduler for model in models.values()]
        num_slots = sum(scheduler.load().num_slots for scheduler in self._schedulers)
        _log.info("serves %s: %d slots", ", ".join(models), num_slots)
        metrics, self._readers = Metrics(models), Readers(options.limits)
        self._mirror = Mirror(metrics)
        self._gate = Gate(make_app(models, options.limits, metrics, self._readers), options.limits)

    async def answer(self, scope: Mapping[str, Any], body: bytes, identity: Identity) -> AsyncIterator[Sent]:
        """What the application sends; ends early where it broke off. Closing it ends the request."""
        self._end_if_dead()
        async with aclosing(messages_of(self._gate, scope, body, identity)) as messages:
            async for each in messages:
                yield each

    async def check_health(self) -> None:
        """Asked by Ray every few seconds, which is as often as metrics are wanted."""
        self._end_if_dead()
        self._mirror.update()

    def __del__(self) -> None:
        for scheduler in getattr(self, "_schedulers", ()):
            scheduler.close()
        if hasattr(self, "_readers"):
            self._readers.close()

    def _end_if_dead(self) -> None:
        """Without its scheduler a replica answers nothing: Ray sees at once that a process has ended."""
        if not all(scheduler.load().alive for scheduler in self._schedulers):
            _log.error("the engine has failed: this replica ends")
            os._exit(1)


class Router:
    """What Ray's proxy speaks to: takes requests, and holds each until it is answered."""

    def __init__(self, options: Options, models: Any) -> None:
        """`models` is Ray's handle to them. Raises UsageError for a key that is asked for and not there."""
        _set_up_log()
        self._models = models.options(stream=True)
        self._limits = options.limits
        self._requests = ray_metrics.Counter(
            "svcli_requests", description="Requests by status.", tag_keys=("path", "status")
        )
        self._repeats = ray_metrics.Counter(
            "svcli_repeats", description="Requests that were asked again since a replica was lost."
        )
        key = read_key(options.api_key_env, options.api_key_file)
        hosts = None if key or options.no_key else ("localhost",)
        self._serves_others = hosts is None
        self._gate = Gate(self._run, self._limits, key=key, hosts=hosts, count=self._count)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._gate

    def _count(self, path: str, status: int) -> None:
        self._requests.inc(tags={"path": path, "status": str(status)})

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            raise NotImplementedError(scope["type"])
        if not self._serves_others and not _is_local(scope):
            message = "other machines need a key: api_key_env or api_key_file, or no_key, of the application"
            raise Problem(403, message, "host_not_allowed")
        if scope["path"] == "/metrics":
            raise Problem(404, "Ray exports the metrics of all replicas; a Router has none", "not_found")
        body = (await receive())["body"]
        is_asked_for_health = scope["path"] == "/health"
        seconds = _HEALTH_SECONDS if is_asked_for_health else self._limits.seconds + _LAST_WORDS_SECONDS
        relay = Relay(send)
        try:
            asking = self._ask({name: scope[name] for name in _PASSED_ON if name in scope}, body, relay)
            await asyncio.wait_for(asking, seconds)
        except asyncio.TimeoutError:
            if is_asked_for_health:
                raise Problem(503, "no replica answers", "not_ready") from None
            await _say(Problem(504, "the answer was not there in time", "timeout"), relay)
        except OtherAnswerError as error:
            _log.error("asked again, %s", error)
            message = "a replica was lost, and another does not go on as it began"
            await _say(Problem(503, message, "replica_lost"), relay)
        except _LostError:
            message = f"replicas were lost {_MOST_TRIES} times while they answered this"
            await _say(Problem(503, message, "replica_lost", headers={"Retry-After": str(RETRY_SECONDS)}), relay)

    async def _ask(self, scope: Mapping[str, Any], body: bytes, relay: Relay) -> None:
        """Until the answer is out. Raises OtherAnswerError, or _LostError where no replica lives long enough."""
        identity, pause = Identity(), _FIRST_PAUSE
        for _ in range(_MOST_TRIES):
            relay.again()
            messages = self._models.answer.remote(scope, body, replace(identity, begin=tuple(relay.ids)))
            try:
                async for message, ids in messages:
                    await relay.take(message, ids)
                why = "it broke off"
            except _LOST as error:
                why = type(error).__name__
            finally:
                messages.cancel()
            if not relay.complete:
                await relay.end_if_told()
            if relay.complete:
                return
            _log.warning("a replica was lost (%s): asking again, behind %d tokens", why, len(relay.ids))
            self._repeats.inc()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise _LostError


class _LostError(Exception):
    """Nobody answers."""


async def _say(problem: Problem, relay: Relay) -> None:
    """Raises it where it can have a status of its own."""
    if not relay.begun:
        raise problem
    await relay.end(event(problem.body).encode())


def _is_local(scope: Scope) -> bool:
    """Whether whoever asks is on the machine of Ray's proxy."""
    try:
        return ipaddress.ip_address((scope.get("client") or ("",))[0]).is_loopback
    except ValueError:
        return False


async def _live(receive: Receive, send: Send) -> None:
    """There is nothing to start and stop."""
    for what in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{what}.complete"})


def _set_up_log() -> None:
    """A line for each request, where Ray keeps what a replica says."""
    ray_log = logging.getLogger("ray.serve")
    _log.handlers, _log.propagate = ray_log.handlers or [logging.StreamHandler(sys.stderr)], False
    _log.setLevel(logging.INFO)
