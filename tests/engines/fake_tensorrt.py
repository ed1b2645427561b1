"""A TensorRT whose plans name ONNX graphs: ONNX Runtime runs them on the addresses that were bound.

What TensorRT refuses is refused as there, with False or None and a line in the log. What it would silently get wrong
(a stray address, a cache that moves, scratch memory that is too small, a captured context that changed) is a Fault.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import skipvision
from svcli_engines.plan_graphs import phase_graph, phases_of
from svcli_engines.plans import (
    FORMAT_VERSION,
    Backend,
    EngineLayout,
    PlanFile,
    PlanPhase,
    PlanRecord,
    PlanSet,
    ShapeRange,
    built_from,
    phase_ranges,
    phase_spec,
    plan_files,
    write_record,
)
from svcli_engines.tensorrt_runtime import STORAGE
from svcli_export.contract import GraphSpec
from svcli_export.manifest import Manifest
from svcli_export.runtime import open_session
from tests.engines.fake_cuda import FakeCuda, Fault, Work

VERSION = "10.15.1"
TARGET = "sm_89"
SCRATCH = {"vision.plan": 5000, "prefill.plan": 9000, "decode.plan": 700, "decoder.plan": 9100}
_MAGIC = b"plan"
_NAMES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "int32": "INT32"}

Edit = Callable[[str, dict[str, Any]], None]
"""Changes the description of a plan before it is written, given its file name."""


def build_plans(
    bundle: Path,
    manifest: Manifest,
    layout: EngineLayout,
    backend: Backend = "tensorrt",
    edit: Edit = lambda _file, _plan: None,
    num_sequences: int = 1,
) -> PlanSet:
    """What `svcli build-engine` leaves in a bundle, for the runtime below."""
    plans = PlanSet(bundle, backend, TARGET)
    shutil.rmtree(plans.folder, ignore_errors=True)
    plans.folder.mkdir(parents=True)
    files = {}
    for file in plan_files(layout):
        phases = phases_of(layout, file, num_sequences)
        graph = _graph(bundle, manifest, layout, phases[0])
        profiles = [phase_ranges(manifest.contract, layout, phase, num_sequences) for phase in phases]
        spec = phase_spec(manifest.contract, layout, phases[0], num_sequences)
        plan = _description(graph, spec, profiles, SCRATCH[file])
        edit(file, plan)
        data = _MAGIC + json.dumps(plan).encode()
        (plans.folder / file).write_bytes(data)
        files[file] = PlanFile(
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            num_layers=3,
            scratch_bytes=SCRATCH[file],
            weight_bytes=100,
            profiles=tuple(profiles),
            plugins=("TokenGather",) if backend == "tensorrt" else (),
            kernel_sha256="0" * 64 if backend == "tensorrt" else "",
            build_seconds=1.5,
        )
    contract = manifest.contract
    record = PlanRecord(
        format_version=FORMAT_VERSION,
        svcli=skipvision.__version__,
        backend=backend,
        backend_version=VERSION,
        target=TARGET,
        layout=layout,
        precision=contract.precision,
        max_context=contract.max_context,
        capacity=contract.capacity,
        num_sequences=num_sequences,
        sources=built_from(manifest),
        plans=files,
    )
    write_record(plans.folder, record)
    return plans


def _graph(bundle: Path, manifest: Manifest, layout: EngineLayout, phase: PlanPhase) -> Path:
    if phase == "vision" or phase == "decode":
        return bundle / manifest.contract.graph(phase).file
    path = bundle / ("decoder.onnx" if layout == "shared" else "alone.onnx")  # beside the weights that it points into
    onnx.save(phase_graph(bundle, manifest, layout, phase), path)
    return path


def _description(graph: Path, spec: GraphSpec, profiles: list[dict[str, ShapeRange]], scratch: int) -> dict[str, Any]:
    tensors = {
        tensor.name: {"mode": mode, "dtype": tensor.dtype, "shape": [_size(each) for each in tensor.shape]}
        for mode, group in (("INPUT", spec.inputs), ("OUTPUT", spec.outputs))
        for tensor in group
    }
    aliases = {name: name.replace("present.", "past_key_values.") for name in tensors if name.startswith("present.")}
    ranges = [
        {name: [list(each.min), list(each.opt), list(each.max)] for name, each in profile.items()}
        for profile in profiles
    ]
    return {"graph": str(graph), "tensors": tensors, "aliases": aliases, "profiles": ranges, "scratch": scratch}


def _size(dimension: int | str) -> int:
    return -1 if isinstance(dimension, str) else dimension


class Logger:
    """What a logger is derived from; severities are integers here."""

    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class FakeTensorRT:
    """The module. `refuses` names what fails: `start`, `memory`, `context`, `profile`, `address`, `shape`, `run` or
    `capture`."""

    ILogger = Logger
    ExecutionContextAllocationStrategy = SimpleNamespace(STATIC=0, USER_MANAGED=2)

    def __init__(self, cuda: FakeCuda, *, rtx: bool = False, version: str = VERSION) -> None:
        self.__version__ = version
        self.cuda, self.rtx = cuda, rtx
        self.refuses: set[str] = set()
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.runs: list[tuple[str, int]] = []
        """Plan's graph and the number of rows or pictures of each run."""
        self.kernels: list[str] = []
        """Compiled in this process, by TensorRT-RTX."""
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY=0, EAGER=1)

    def Runtime(self, logger: Logger) -> Runtime:
        if "start" in self.refuses:
            logger.log(Logger.ERROR, "no driver today")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return Runtime(self, logger)


@dataclass
class Runtime:
    """Reads plans."""

    module: FakeTensorRT
    logger: Logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Engine | None:
        data = bytes(serialized_engine)
        if "memory" in self.module.refuses:
            self.logger.log(Logger.ERROR, "OutOfMemory (Requested size was 7 bytes.)")
            return None
        if not data.startswith(_MAGIC):
            self.logger.log(Logger.WARNING, "a warning that is none of the user's business")
            self.logger.log(Logger.ERROR, "magicTag assertion\n failed")
            self.logger.log(Logger.ERROR, "something that follows from it")
            return None
        return Engine(self.module, self.logger, json.loads(data[len(_MAGIC) :]))


class Engine:
    """One plan."""

    def __init__(self, module: FakeTensorRT, logger: Logger, plan: dict[str, Any]) -> None:
        self.module, self.logger, self.plan = module, logger, plan
        self.tensors: dict[str, dict[str, Any]] = plan["tensors"]
        self.num_io_tensors = len(self.tensors)
        self.device_memory_size_v2 = plan["scratch"]

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name=self.tensors[name]["mode"])

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_NAMES[self.tensors[name]["dtype"]])

    def get_tensor_location(self, name: str) -> Any:
        return SimpleNamespace(name=self.tensors[name].get("location", "DEVICE"))

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self.tensors[name]["shape"])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        shapes: list[list[int]] = self.plan["profiles"][profile_index][name]
        return shapes

    def get_aliased_input_tensor(self, name: str) -> str | None:
        alias: str | None = self.plan["aliases"].get(name)
        return alias

    def create_runtime_config(self) -> RuntimeConfig:
        return RtxRuntimeConfig(self.module) if self.module.rtx else RuntimeConfig()

    def create_execution_context(self, runtime_config: RuntimeConfig) -> Context | None:
        assert runtime_config.strategy == FakeTensorRT.ExecutionContextAllocationStrategy.USER_MANAGED
        if "context" in self.module.refuses:
            self.logger.log(Logger.INTERNAL_ERROR, "no context today")
            return None
        return (RtxContext if self.module.rtx else Context)(self, runtime_config)


class RuntimeConfig:
    """How a context is made."""

    strategy = FakeTensorRT.ExecutionContextAllocationStrategy.STATIC
    dynamic_shapes_kernel_specialization_strategy = 0

    def set_execution_context_allocation_strategy(self, strategy: int) -> None:
        self.strategy = strategy


class RuntimeCache:
    """What TensorRT-RTX has compiled: the names of plans."""

    def __init__(self, module: FakeTensorRT) -> None:
        self.module, self.known = module, list[str]()

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(_MAGIC):
            return False
        self.known = json.loads(blob[len(_MAGIC) :])
        return True

    def serialize(self) -> memoryview:
        return memoryview(_MAGIC + json.dumps(self.known).encode())

    def compile(self, kernel: str) -> None:
        if kernel not in self.known:
            self.known.append(kernel)
            self.module.kernels.append(kernel)


class RtxRuntimeConfig(RuntimeConfig):
    """Of TensorRT-RTX, which compiles kernels where it runs."""

    cache: RuntimeCache | None = None

    def __init__(self, module: FakeTensorRT) -> None:
        self.module = module

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self.module)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


@dataclass(frozen=True)
class Job:
    """All that a run depends on, as it was when the run was enqueued."""

    profile: int
    shapes: Mapping[str, tuple[int, ...]]
    addresses: Mapping[str, int]
    scratch: tuple[int, int]


class Context:
    """One execution context."""

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        self.engine, self.config = engine, config
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self._ran: Job | None = None
        engine.module.contexts.add(self)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.engine.module.cuda.enqueue(stream_handle, Work(lambda: None))
        if self._refused("profile") or profile_index >= len(self.engine.plan["profiles"]):
            raise RuntimeError("Error in set optimization profile async.")  # which is how the bindings say no
        self.profile, self.shapes = profile_index, {}
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self.scratch = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "no profile was chosen"
        smallest, _, largest = self.engine.plan["profiles"][self.profile][name]
        within = all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True))
        if self._refused("shape") or not within:
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._refused("address") or memory % 256 or name not in self.engine.tensors:
            return False
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        module = self.engine.module
        if self._refused("run") or (module.cuda.capturing is not None and self._refused("capture")):
            return False
        if module.cuda.last_error:
            return self._error(f"a kernel reported the error {module.cuda.last_error} of something before it")
        for name, tensor in self.engine.tensors.items():
            if tensor["mode"] == "INPUT" and -1 in tensor["shape"] and name not in self.shapes:
                return self._error(f"the shape of {name} was not set")
            if name not in self.addresses:
                return self._error(f"the address of {name} was not set")
        job = self._job()
        self._check(job)
        if module.cuda.capturing is not None and self._ran != job:
            return self._error("a capture before the first run with these shapes")
        self._ran = job
        module.cuda.enqueue(stream_handle, Work(lambda: self._run(job), lambda: self._check_unchanged(job)))
        return True

    def _job(self) -> Job:
        assert self.profile is not None, "no profile was chosen"
        return Job(self.profile, dict(self.shapes), dict(self.addresses), self.scratch)

    def _check(self, job: Job) -> None:
        address, size = job.scratch
        if size < self.engine.device_memory_size_v2:
            raise Fault(f"{size} bytes of scratch memory instead of {self.engine.device_memory_size_v2}")
        self.engine.module.cuda.memory(address, size)
        for present, past in self.engine.plan["aliases"].items():
            if job.addresses[past] != job.addresses[present]:
                raise Fault(f"{present} lies elsewhere than {past}")
        for name in self.engine.tensors:
            self._memory(name, job)

    def _check_unchanged(self, job: Job) -> None:
        if self._job() != job:
            raise Fault("a graph was launched whose context has changed since it was captured")

    def _memory(self, name: str, job: Job) -> np.ndarray[Any, np.dtype[Any]]:
        """The tensor, on the GPU."""
        tensor = self.engine.tensors[name]
        count = job.shapes.get("pixels", job.shapes.get("input_ids", (1,)))[0]
        shape = job.shapes.get(name) or [count if size == -1 else size for size in tensor["shape"]]
        dtype = STORAGE[tensor["dtype"]]
        memory = self.engine.module.cuda.memory(job.addresses[name], int(np.prod(shape)) * dtype.itemsize)
        return memory.view(dtype).reshape(shape)

    def _run(self, job: Job) -> None:
        modes = {name: tensor["mode"] for name, tensor in self.engine.tensors.items()}
        feeds = {name: self._memory(name, job).copy() for name, mode in modes.items() if mode == "INPUT"}
        self.engine.module.cuda.memory(*job.scratch)[...] = 0xAB
        outputs = [name for name, mode in modes.items() if mode == "OUTPUT"]
        path = Path(self.engine.plan["graph"])
        rows = feeds["pixels" if "pixels" in feeds else "position_ids"]
        if isinstance(self.config, RtxRuntimeConfig) and self.config.cache is not None:
            self.config.cache.compile(path.stem)
        self.engine.module.runs.append((path.stem, len(rows) if "pixels" in feeds else rows.size))
        for name, value in zip(outputs, _session(path).run(outputs, feeds), strict=True):
            self._memory(name, job)[...] = value

    def _refused(self, what: str) -> bool:
        return what in self.engine.module.refuses and not self._error(f"{what} refused")

    def _error(self, message: str) -> bool:
        self.engine.logger.log(Logger.ERROR, message)
        return False


class RtxContext(Context):
    """One of TensorRT-RTX, which can tell whether it may be captured."""

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream
        # Kernels that are compiled meanwhile would not be in the graph.
        eager = self.engine.module.DynamicShapesKernelSpecializationStrategy.EAGER
        assert self.config.dynamic_shapes_kernel_specialization_strategy == eager
        return "capturable" not in self.engine.module.refuses


@lru_cache(maxsize=16)
def _session(path: Path) -> ort.InferenceSession:
    return open_session(path, num_threads=1)


def whole_buffers(path: Path) -> ort.InferenceSession:
    """`_session` with the whole of what CacheRead takes a part of, as plans have it: so what lies behind counts."""
    model = onnx.load(path, load_external_data=False)
    for function in model.functions:
        if function.name == "CacheRead":
            del function.node[:]
            function.node.append(onnx.helper.make_node("Identity", function.input[:1], function.output[:]))
    whole = path.with_name(f"whole-{path.name}")
    onnx.save(model, whole)
    return open_session(whole, num_threads=1)
