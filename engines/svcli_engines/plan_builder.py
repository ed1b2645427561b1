"""The program that builds one plan through polygraphy. builder_process.py starts it, asks it and listens to it.

It prints what TensorRT and polygraphy print, and answers on a channel of its own.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from threading import Lock
from time import monotonic, perf_counter
from types import new_class
from typing import IO, Any

from svcli_engines.base import MachineError
from svcli_engines.builder_process import Answer, Built, Failure, Job, Task, Tools
from svcli_engines.plans import Backend
from svcli_engines.plugins.compile import CompilerMissing, DriverTooOld, TargetError, check_driver, find_compiler
from svcli_engines.plugins.compile import target_for as plugin_target
from svcli_engines.plugins.nvrtc import CompileError
from svcli_engines.plugins.registration import PluginError, register_plugins
from svcli_engines.tensorrt_runtime import import_backend

_SECONDS_BETWEEN = 0.2
"""Progress is told no more often."""
_KV_CACHE, _PLUGIN = "KV_CACHE_UPDATE", "PLUGIN_V3"
"""TensorRT's names of layer types."""


class RefusedError(ValueError):
    """What TensorRT would not build, or built otherwise than it was meant."""


class Phases:
    """How far a build is, from the phases that TensorRT reports. They nest, and may run in several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._parents: dict[str, str | None] = {}
        self._steps: dict[str, tuple[int, int]] = {}
        """Done, and all."""
        self._furthest = 0.0

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        with self._lock:
            self._parents[name], self._steps[name] = parent, (0, max(num_steps, 1))

    def step(self, name: str, number: int) -> None:
        """Step `number`, from 0 on, is done."""
        with self._lock:
            if name in self._steps:
                self._steps[name] = number + 1, self._steps[name][1]

    def finish(self, name: str) -> None:
        with self._lock:
            self._parents.pop(name, None)
            self._steps.pop(name, None)

    @property
    def share(self) -> float:
        """Of the whole, as far as is known; it never falls, though phases may come back."""
        with self._lock:
            roots = [self._share(name) for name, parent in self._parents.items() if parent not in self._steps]
            self._furthest = max(self._furthest, *roots, 0.0)
            return self._furthest

    def _share(self, name: str) -> float:
        done, number = self._steps[name]
        inside = [self._share(child) for child, parent in self._parents.items() if parent == name != child]
        return min((done + max(inside, default=0.0)) / number, 1.0)


class Channel:
    """Where answers go."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = Lock()
        self._last = 0.0

    def tell(self, share: float) -> bool:
        """Tells progress now and then; False where nobody listens any more."""
        now = monotonic()
        with self._lock:
            if now - self._last < _SECONDS_BETWEEN:
                return True
            self._last = now
        return self.answer(Answer(progress=share))

    def answer(self, answer: Answer) -> bool:
        try:
            with self._lock:
                self._stream.write(answer.model_dump_json(exclude_none=True) + "\n")
                self._stream.flush()
        except BrokenPipeError:
            return False
        return True


def main(descriptor: int) -> None:
    """Does the task on stdin. Whatever is not foreseen ends the process with a traceback, which goes to the log."""
    # Ctrl-C reaches every process of the terminal; the one that listens ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    task = Task.model_validate_json(sys.stdin.buffer.read())
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        channel = Channel(stream)
        channel.answer(_done(task, channel))


def _done(task: Task, channel: Channel) -> Answer:
    try:
        if task.job is None:
            return Answer(tools=_tools(task))
        return Answer(built=_build(task, task.job, channel))
    except (MachineError, CompilerMissing, DriverTooOld, PluginError) as error:
        return Answer(failure=Failure(message=str(error), is_lack=True))
    except (RefusedError, TargetError, CompileError) as error:
        return Answer(failure=Failure(message=str(error), is_lack=False))
    except (MemoryError, OSError) as error:
        return Answer(failure=Failure(message=f"{type(error).__name__}: {error}", is_lack=False))


def _tools(task: Task) -> Tools:
    """Raises one of the errors above where something is missing."""
    module = import_backend(task.backend)
    _polygraphy()
    version = str(module.__version__)
    if task.backend == "tensorrt-rtx":
        names = [name.removeprefix("SM") for name in module.ComputeCapability.__members__]
        return Tools(version=version, targets=tuple(f"sm_{name}" for name in names if name.isdigit()))
    _check_compiler(task)
    return Tools(version=version, targets=())


def _build(task: Task, job: Job, channel: Channel) -> Built:
    start = perf_counter()
    module, loaders = import_backend(task.backend), _polygraphy()
    if job.num_plugins:
        _check_compiler(task)
        register_plugins(plugin_target(*_capability(job.target)))
    try:
        # A node with `plugin_namespace` takes a registered plugin before its body, and needs no parser flag for it.
        parsed = loaders.NetworkFromOnnxPath(str(job.graph), strongly_typed=True)()
        # Attention of which there is no fused kernel for this GPU and these sizes is taken apart instead of refused.
        network = loaders.SetDecomposableAttentions(parsed)()
        _check_network(network[1], job)
        timing_cache = None if job.timing_cache is None else str(job.timing_cache)
        config = _config(task.backend, module, loaders, job, channel)
        plan = loaders.EngineBytesFromNetwork(network, config=config, save_timing_cache=timing_cache)()
        scratch = None
        if job.runs_here:
            engine = loaders.EngineFromBytes(plan)()
            _check_caches(engine, job)
            scratch = int(engine.device_memory_size_v2)
    except import_module("polygraphy.exception").PolygraphyException as error:
        raise RefusedError(str(error).strip().splitlines()[0]) from None
    with job.plan.open("wb") as file:
        file.write(plan)
    return Built(
        version=str(module.__version__),
        num_layers=network[1].num_layers,
        scratch_bytes=scratch,
        seconds=perf_counter() - start,
    )


def _polygraphy() -> Any:
    """polygraphy's loaders, which print everything that TensorRT has to say but its most verbose."""
    try:
        loaders: Any = import_module("polygraphy.backend.trt")
    except ModuleNotFoundError:
        raise MachineError(
            "polygraphy is needed for building plans and not installed: pip install polygraphy"
        ) from None
    logger = import_module("polygraphy.logger").G_LOGGER
    logger.colors, logger.module_severity = False, logger.VERBOSE
    return loaders


def _config(backend: Backend, module: Any, loaders: Any, job: Job, channel: Channel) -> Any:
    """What makes the builder's configuration: one profile a phase."""
    profiles = []
    for ranges in job.profiles:
        profile = loaders.Profile()
        for name, each in ranges.items():
            profile.add(name, each.min, each.opt, each.max)
        profiles.append(profile)
    limits = None if job.workspace is None else {module.MemoryPoolType.WORKSPACE: job.workspace}
    common = {"profiles": profiles, "memory_pool_limits": limits, "progress_monitor": _monitor(module, channel.tell)}
    if backend == "tensorrt-rtx":
        rtx = import_module("polygraphy.backend.tensorrt_rtx")
        config = rtx.CreateConfigRTX(compute_capabilities=[_capability(job.target)], **common)
        # A plan that allocates while it runs can neither be recorded nor work in memory of ours.
        flag = module.BuilderFlag.REQUIRE_USER_ALLOCATION
        return loaders.PostprocessConfig(config, lambda _builder, _network, made: made.set_flag(flag))
    known = job.timing_cache is not None and job.timing_cache.is_file()
    return loaders.CreateConfig(load_timing_cache=str(job.timing_cache) if known else None, **common)


def _monitor(module: Any, tell: Callable[[float], bool]) -> Any:
    """Tells how far the build is; TensorRT gives up where `tell` is False."""
    phases = Phases()

    def start(_self: Any, name: str, parent: str | None, num_steps: int) -> None:
        phases.start(name, parent, num_steps)

    def step(_self: Any, name: str, number: int) -> bool:
        phases.step(name, number)
        return tell(phases.share)

    def finish(_self: Any, name: str) -> None:
        phases.finish(name)

    methods = {"phase_start": start, "step_complete": step, "phase_finish": finish}
    return new_class("Monitor", (module.IProgressMonitor,), exec_body=lambda body: body.update(methods))()


def _check_network(network: Any, job: Job) -> None:
    """Raises RefusedError where the parser made something else of our ops than they are for."""
    layers = Counter(network.get_layer(number).type.name for number in range(network.num_layers))
    if layers[_KV_CACHE] != len(job.caches):
        raise RefusedError(f"of {len(job.caches)} cache updates {layers[_KV_CACHE]} are layers that write in place")
    if layers[_PLUGIN] < job.num_plugins:
        raise RefusedError(f"of {job.num_plugins} plugin nodes {layers[_PLUGIN]} took the plugin")


def _check_caches(engine: Any, job: Job) -> None:
    """Raises RefusedError where the plan does not write its caches in place."""
    for past, present in job.caches.items():
        if engine.get_aliased_input_tensor(present) != past:
            raise RefusedError(f"the plan does not write {past} in place")


def _check_compiler(task: Task) -> None:
    """Raises CompilerMissing, or DriverTooOld where the driver would not load what the compiler writes."""
    compiler = find_compiler()
    if task.driver is not None:
        check_driver(compiler, task.driver)


def _capability(target: str) -> tuple[int, int]:
    """`sm_120` is 12.0."""
    number = int(target.removeprefix("sm_"))
    return number // 10, number % 10
