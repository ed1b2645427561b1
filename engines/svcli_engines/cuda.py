"""What an engine asks of the CUDA run time: one stream, the memory that belongs to it, and graphs. Imports no torch.

A thin wrapper around `cuda.bindings.runtime` of cuda-python, which is imported when it is first needed.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from svcli_engines.base import EngineError, MachineError

HostArray = npt.NDArray[Any]
Outcome = tuple[Any, ...]
"""An error code, and the result where there is one."""

_OUT_OF_MEMORY = 2
_NO_GPU = {
    35: "the NVIDIA driver is missing, or older than the CUDA of cuda-bindings",
    100: "no NVIDIA GPU was found",
}
"""cudaErrorInsufficientDriver, cudaErrorNoDevice."""


class CudaError(EngineError):
    """What CUDA refused; one sentence."""


class CudaRuntime(Protocol):
    """The functions of `cuda.bindings.runtime` that are used here, by their names there."""

    cudaMemcpyKind: Any
    cudaStreamCaptureMode: Any
    cudaDeviceAttr: Any
    cudaStreamNonBlocking: int

    def cudaGetErrorName(self, error: Any) -> Outcome: ...
    def cudaGetErrorString(self, error: Any) -> Outcome: ...
    def cudaGetLastError(self) -> Outcome: ...
    def cudaDeviceGetAttribute(self, attr: Any, device: int) -> Outcome: ...
    def cudaMemGetInfo(self) -> Outcome: ...
    def cudaMalloc(self, size: int) -> Outcome: ...
    def cudaFree(self, devPtr: int) -> Outcome: ...
    def cudaHostAlloc(self, size: int, flags: int) -> Outcome: ...
    def cudaFreeHost(self, ptr: int) -> Outcome: ...
    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: int) -> Outcome: ...
    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> Outcome: ...
    def cudaStreamCreateWithFlags(self, flags: int) -> Outcome: ...
    def cudaStreamSynchronize(self, stream: int) -> Outcome: ...
    def cudaStreamDestroy(self, stream: int) -> Outcome: ...
    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> Outcome: ...
    def cudaStreamEndCapture(self, stream: int) -> Outcome: ...
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Outcome: ...
    def cudaGraphLaunch(self, graphExec: Any, stream: int) -> Outcome: ...
    def cudaGraphDestroy(self, graph: Any) -> Outcome: ...
    def cudaGraphExecDestroy(self, graphExec: Any) -> Outcome: ...


class Cuda:
    """The first GPU: a stream, and what was allocated for it. Everything but allocation is ordered by the stream."""

    def __init__(self, runtime: CudaRuntime | None = None) -> None:
        """Raises MachineError where there is no cuda-bindings, no driver or no GPU."""
        self._runtime = _bindings() if runtime is None else runtime
        self._device: list[int] = []
        self._host: list[int] = []
        self._graphs: list[Any] = []
        self._closed = False
        self.target = f"sm_{self._attribute('ComputeCapabilityMajor')}{self._attribute('ComputeCapabilityMinor')}"
        """Compute capability, such as `sm_89`."""
        # A blocking stream would wait for whatever else the process puts on the default one.
        flags = self._runtime.cudaStreamNonBlocking
        self.stream = int(self._done("making a stream", self._runtime.cudaStreamCreateWithFlags(flags)))

    @property
    def free_bytes(self) -> int:
        """Of the GPU's memory, whoever uses the rest."""
        return int(self._done("asking for free memory", self._runtime.cudaMemGetInfo()))

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of zeros on the GPU, aligned to 256 bytes."""
        address = int(self._done(f"allocating {size} bytes", self._runtime.cudaMalloc(size)))
        self._device.append(address)
        # Rows that are masked still enter the product with V, where 0 times a stray NaN would be NaN.
        self._done("clearing memory", self._runtime.cudaMemsetAsync(address, 0, size, self.stream))
        return address

    def allocate_host(self, size: int) -> HostArray:
        """[size] bytes in memory that the GPU can copy from and to while the CPU goes on."""
        address = int(self._done(f"allocating {size} bytes of host memory", self._runtime.cudaHostAlloc(size, 0)))
        self._host.append(address)
        memory: HostArray = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return memory

    def to_device(self, address: int, host: HostArray) -> None:
        """Enqueues a copy of `host`, which must come from `allocate_host` and stay as it is until `synchronize`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(address, host.ctypes.data, host.nbytes, kind)

    def to_host(self, host: HostArray, address: int) -> None:
        """Enqueues a copy into `host`, which must come from `allocate_host` and holds it after `synchronize`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(host.ctypes.data, address, host.nbytes, kind)

    def synchronize(self) -> None:
        """Waits for the stream. Errors of what was enqueued show here."""
        self._done("waiting for the GPU", self._runtime.cudaStreamSynchronize(self.stream))

    def drain(self) -> None:
        """Waits for the stream, whatever became of it."""
        if not self._closed:
            self._runtime.cudaStreamSynchronize(self.stream)

    def begin_capture(self) -> None:
        """What is enqueued from here on is recorded instead of run."""
        # Thread-local: what other threads do meanwhile is not our business.
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._done("starting a capture", self._runtime.cudaStreamBeginCapture(self.stream, mode))

    def end_capture(self) -> Any:
        """A graph of what was recorded, ready for `launch`."""
        graph = self._done("ending a capture", self._runtime.cudaStreamEndCapture(self.stream))
        try:
            launchable = self._done("making a graph", self._runtime.cudaGraphInstantiate(graph, 0))
        finally:
            self._runtime.cudaGraphDestroy(graph)
        self._graphs.append(launchable)
        return launchable

    def abandon_capture(self) -> None:
        """Ends a capture that failed, so that the stream runs things again."""
        error, *graph = self._runtime.cudaStreamEndCapture(self.stream)
        if int(error) == 0:
            self._runtime.cudaGraphDestroy(graph[0])
        # The next launch of a kernel would report the error of this one.
        self._runtime.cudaGetLastError()

    def launch(self, graph: Any) -> None:
        self._done("launching a graph", self._runtime.cudaGraphLaunch(graph, self.stream))

    def close(self) -> None:
        """Frees everything, once. Errors are ignored: after a failure of the GPU nothing can be freed one by one."""
        if self._closed:
            return
        self.drain()
        self._closed = True
        for graph in self._graphs:
            self._runtime.cudaGraphExecDestroy(graph)
        for address in self._device:
            self._runtime.cudaFree(address)
        for address in self._host:
            self._runtime.cudaFreeHost(address)
        self._runtime.cudaStreamDestroy(self.stream)

    def _copy(self, to: int, source: int, size: int, kind: Any) -> None:
        self._done(f"copying {size} bytes", self._runtime.cudaMemcpyAsync(to, source, size, kind, self.stream))

    def _attribute(self, name: str) -> int:
        attribute = getattr(self._runtime.cudaDeviceAttr, f"cudaDevAttr{name}")
        return int(self._done("asking for the GPU", self._runtime.cudaDeviceGetAttribute(attribute, 0)))

    def _done(self, what: str, outcome: Outcome) -> Any:
        """The result of a call, if any. Raises MachineError for want of a GPU or of memory, CudaError for the rest."""
        error, *result = outcome
        code = int(error)
        if code == 0:
            return result[0] if result else None
        if code in _NO_GPU:
            raise MachineError(f"{_NO_GPU[code]}; see what `svcli doctor` says")
        if code == _OUT_OF_MEMORY:
            raise MachineError(
                f"the GPU has too little free memory ({what}); end what else uses it, or export with a smaller context"
            )
        _, name = self._runtime.cudaGetErrorName(error)
        _, text = self._runtime.cudaGetErrorString(error)
        raise CudaError(f"CUDA failed while {what}: {_text(text)} ({_text(name)})")


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _bindings() -> CudaRuntime:
    try:
        runtime: CudaRuntime = importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError:
        raise MachineError(
            "cuda-bindings is needed for this and not installed: pip install cuda-bindings; see `svcli doctor`, too"
        ) from None
    return runtime
