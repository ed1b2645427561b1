"""What the engine asks of the `tensorrt` or the `tensorrt_rtx` module: the two have one API. Imports neither."""

from __future__ import annotations

import importlib
import math
import mmap
import os
import re
import tempfile
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from svcli_engines.base import EngineError, MachineError
from svcli_engines.cuda import Cuda
from svcli_engines.plans import Backend, PlanSet, refusal
from svcli_export.contract import GraphSpec, TensorSpec

Shape = tuple[int, ...]

STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "int64": np.dtype(np.int64),
}
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64"}
"""TensorRT's names to the contract's."""
TOO_LITTLE_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|cannot allocate memory|MemoryError", re.IGNORECASE)
"""How TensorRT, C++ and Python say it."""
_MODULES: dict[Backend, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_REMEDIES: dict[Backend, str] = {
    "tensorrt": "install TensorRT 10.15 or newer with its Python package",
    "tensorrt-rtx": "pip install tensorrt-rtx-cu13",
}


class TensorRT:
    """The module, its log and its run time, on one stream."""

    def __init__(self, backend: Backend, cuda: Cuda, module: Any = None) -> None:
        """`module`: instead of the one that is installed. Raises MachineError where none is, or it does not start."""
        self._module = import_backend(backend) if module is None else module
        self.version = str(self._module.__version__)
        self.cuda = cuda
        self._errors: list[str] = []
        self._log = _log(self._module, self._errors)
        try:
            self._runtime = self._module.Runtime(self._log)
        except (TypeError, RuntimeError):  # what the bindings make of a null pointer
            raise MachineError(f"TensorRT {self.version} could not be started ({self.reason()})") from None
        self._kernels: KernelCache | None = None

    def keep_kernels(self, path: Path) -> None:
        """Contexts from here on take the kernels that TensorRT-RTX compiles on this GPU from the file `path`."""
        self._kernels = KernelCache(path)

    def close(self) -> None:
        """Keeps the kernels that were compiled."""
        if self._kernels is not None:
            self._kernels.write()

    def load(self, plans: PlanSet, file: str) -> Any:
        """The deserialised plan. Raises PlanError where it cannot be read, EngineError for lack of memory."""
        with (plans.folder / file).open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            reason = self.reason()
            if TOO_LITTLE_MEMORY.search(reason):
                raise MachineError(f"the GPU has too little free memory for {file}; end what else uses it ({reason})")
            raise refusal(plans, f"TensorRT {self.version} cannot read {file} ({reason})")
        return engine

    def context(self, engine: Any, profile: int, scratch: tuple[int, int], *, captured: bool) -> Any:
        """A context for one profile that works in `scratch`, an address and a size. Raises EngineError."""
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._module.ExecutionContextAllocationStrategy.USER_MANAGED)
        specialization = getattr(self._module, "DynamicShapesKernelSpecializationStrategy", None)
        if captured and specialization is not None:
            # TensorRT-RTX compiles kernels for a shape while makeshift ones run; a graph would keep those for good.
            config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        if self._kernels is not None:
            self._kernels.attach(config)
        context = engine.create_execution_context(config)
        self.need(context is not None, "TensorRT made no execution context")
        try:
            context.set_optimization_profile_async(profile, self.cuda.stream)
        except RuntimeError:
            raise EngineError(f"TensorRT refused profile {profile} ({self.reason()})") from None
        self.cuda.synchronize()
        context.set_device_memory(*scratch)
        return context

    def need(self, granted: bool, otherwise: str) -> None:
        """Raises EngineError with TensorRT's reason where something was not granted."""
        if not granted:
            raise EngineError(f"{otherwise} ({self.reason()})")

    def reason(self) -> str:
        """The first error that TensorRT logged since it was last asked: later ones tend to follow from it."""
        first = (self._errors or ["it gave no reason"])[0]
        self._errors.clear()
        return " ".join(first.split())


class KernelCache:
    """Kernels that TensorRT-RTX compiled on this GPU, in a file: without it every start compiles them anew.

    TensorRT itself refuses what another version, GPU or driver has written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: Any = None
        self._written = b""

    def attach(self, config: Any) -> None:
        """Has contexts of this configuration use the cache; TensorRT proper compiles nothing, and has none."""
        if not hasattr(config, "create_runtime_cache"):
            return
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with suppress(OSError):
                found = self._path.read_bytes()
                self._written = found if self._cache.deserialize(found) else b""
        config.set_runtime_cache(self._cache)

    def write(self) -> None:
        """Writes what is new, atomically. That it cannot be written is no failure."""
        if self._cache is None:
            return
        kernels = bytes(self._cache.serialize())
        if kernels == self._written:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as file:
                file.write(kernels)
            os.replace(file.name, self._path)
            self._written = kernels


@dataclass(frozen=True)
class LoadedPlan:
    """One plan in memory."""

    plans: PlanSet
    file: str
    engine: Any

    @property
    def scratch_size(self) -> int:
        """Bytes that every profile of it can work in."""
        return int(self.engine.device_memory_size_v2)

    def dtypes(self, spec: GraphSpec) -> dict[str, str]:
        """dtype of every tensor. Raises PlanError where the plan takes or gives something else than `spec` says."""
        modes = {tensor.name: "INPUT" for tensor in spec.inputs} | {tensor.name: "OUTPUT" for tensor in spec.outputs}
        names = {self.engine.get_tensor_name(number) for number in range(self.engine.num_io_tensors)}
        if unlike := sorted(names ^ modes.keys()):
            raise self._refusal(f"{'has the unknown tensor' if unlike[0] in names else 'lacks the tensor'} {unlike[0]}")
        return {tensor.name: self._dtype(tensor, modes[tensor.name]) for tensor in (*spec.inputs, *spec.outputs)}

    def check_caches(self, caches: Mapping[str, str]) -> None:
        """Raises PlanError where a cache (past name to present name) would be copied instead of written in place."""
        for past, present in caches.items():
            if self.engine.get_aliased_input_tensor(present) != past:
                raise self._refusal(f"does not write {past} in place")

    def range(self, tensor: TensorSpec, profile: int) -> tuple[Shape, Shape]:
        """Smallest and largest shape of an input."""
        if all(isinstance(each, int) for each in tensor.shape):
            return (whole := tuple(map(int, tensor.shape))), whole
        smallest, _, largest = self.engine.get_tensor_profile_shape(tensor.name, profile)
        return tuple(smallest), tuple(largest)

    def _dtype(self, tensor: TensorSpec, mode: str) -> str:
        name, engine = tensor.name, self.engine
        dtype = _DTYPES.get(engine.get_tensor_dtype(name).name, "another type")
        shape = tuple(each if isinstance(each, int) else -1 for each in tensor.shape)
        found = tuple(engine.get_tensor_shape(name))
        if dtype != tensor.dtype or found != shape:
            raise self._refusal(f"has {name} as {dtype} {list(found)} instead of {tensor.dtype} {list(shape)}")
        if engine.get_tensor_mode(name).name != mode:
            raise self._refusal(f"does not have {name} as {mode.lower()}")
        if engine.get_tensor_location(name).name != "DEVICE":
            raise self._refusal(f"wants {name} outside the GPU")
        return dtype

    def _refusal(self, problem: str) -> Exception:
        return refusal(self.plans, f"{self.file} {problem}")


class Phase:
    """One phase of the contract in an execution context of its own."""

    def __init__(
        self,
        tensorrt: TensorRT,
        plan: LoadedPlan,
        profile: int,
        spec: GraphSpec,
        caches: Mapping[str, str],
        scratch: tuple[int, int],
        *,
        captured: bool = False,
    ) -> None:
        """`caches`: past name to present name. Raises PlanError where the plan is not what `spec` says."""
        self._tensorrt, self._plan = tensorrt, plan
        self._dtypes = plan.dtypes(spec)
        plan.check_caches({past: present for past, present in caches.items() if past in self._dtypes})
        self.fed = {tensor.name: tensor for tensor in spec.inputs if tensor.name not in caches}
        """Inputs that change from run to run."""
        free = [tensor for tensor in spec.inputs if tensor.name in caches and isinstance(tensor.shape[0], str)]
        self._caches = {tensor.name: tensor for tensor in free}
        """Those of several sequences, as many as there are in a run."""
        self._results = {tensor.name: tensor for tensor in spec.outputs if tensor.name not in caches.values()}
        shaped = self.fed | self._caches
        self.ranges = {name: plan.range(tensor, profile) for name, tensor in shaped.items()}
        """Smallest and largest shape of each input that has several."""
        self._context = tensorrt.context(plan.engine, profile, scratch, captured=captured)

    def dtype(self, name: str) -> str:
        return self._dtypes[name]

    def output_shape(self, name: str) -> Shape:
        """-1 where it is free."""
        return tuple(each if isinstance(each, int) else -1 for each in self._results[name].shape)

    def sizes(self) -> dict[str, int]:
        """Bytes of each fed input, and of each output that is no cache, at their largest."""
        most = {
            dimension: size
            for name, tensor in self.fed.items()
            for dimension, size in zip(tensor.shape, self.ranges[name][1], strict=True)
            if isinstance(dimension, str)
        }
        shapes = {
            tensor.name: tuple(most[each] if isinstance(each, str) else each for each in tensor.shape)
            for tensor in (*self.fed.values(), *self._results.values())
        }
        return {name: num_bytes(shape, self._dtypes[name]) for name, shape in shapes.items()}

    def shapes(self, feeds: Mapping[str, npt.NDArray[Any]], num_sequences: int = 1) -> dict[str, Shape]:
        """Shape of every input: of what is fed, or one row, as of pictures in a prompt without any.

        A dimension of 0 would be right as well, but not every TensorRT and plugin has it.
        """
        least = {name: tuple(max(1, size) for size in smallest) for name, (smallest, _) in self.ranges.items()}
        caches = {name: (num_sequences, *least[name][1:]) for name in self._caches}
        return {name: feeds[name].shape if name in feeds else least[name] for name in self.fed} | caches

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Binds tensors to their addresses, those that the phase has: all of them before the first run."""
        for name in (name for name in addresses if name in self._dtypes):
            self._tensorrt.need(
                self._context.set_tensor_address(name, addresses[name]), f"TensorRT refused the address of {name}"
            )

    def set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Shapes of the next runs. Raises PlanError for one that the plan was not built for."""
        for name, (smallest, largest) in self.ranges.items():
            shape = shapes[name]
            fits = len(shape) == len(largest)
            if not fits or any(
                not low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
            ):
                was = f"takes {name} of {list(smallest)} to {list(largest)}, not {list(shape)}"
                whole = replace(self._plan.plans, max_context=None)
                raise refusal(whole, f"{self._plan.file} {was}")
            self._tensorrt.need(self._context.set_input_shape(name, shape), f"TensorRT refused {name} of {list(shape)}")

    def capturable(self) -> bool:
        """Whether a run can be recorded; only TensorRT-RTX can tell beforehand."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._tensorrt.cuda.stream))

    def enqueue(self) -> None:
        """Enqueues one run. Raises EngineError where TensorRT refuses it."""
        started = self._context.execute_async_v3(self._tensorrt.cuda.stream)
        self._tensorrt.need(started, f"TensorRT could not run {self._plan.file}")


def num_bytes(shape: Shape, dtype: str) -> int:
    return math.prod(shape) * STORAGE[dtype].itemsize


def import_backend(backend: Backend) -> Any:
    """Raises MachineError where it is not installed, or cannot be loaded."""
    try:
        return importlib.import_module(_MODULES[backend])
    except (ImportError, OSError) as error:  # OSError: bindings without their libraries
        found = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({error})"
        raise MachineError(f"{_MODULES[backend]} {found}: {_REMEDIES[backend]}") from None


def _log(module: Any, errors: list[str]) -> Any:
    """A logger that keeps errors and prints nothing."""
    serious = module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR

    def log(_self: Any, severity: Any, message: str) -> None:
        if severity in serious:
            errors.append(str(message))

    return types.new_class("Log", (module.ILogger,), exec_body=lambda body: body.update(log=log))()
