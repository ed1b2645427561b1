"""A CUDA run time without a GPU, as hard on its user as a real one: memory is checked, streams have an order.

`late` runs what was enqueued only when the stream is waited for, and shows NaN until then; otherwise at once. A real
GPU does either, so code that is right works with both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from svcli_engines.cuda import Outcome

HostMemory = npt.NDArray[np.uint8]

OUT_OF_MEMORY, NO_DRIVER, NOT_IN_CAPTURE, CAPTURE_INVALIDATED, FAILED = 2, 35, 900, 901, 719
_NOISE = 0xFF
"""In every byte: NaN in fp32 and fp16, -1 in integers."""
_GAP = 4096
"""Bytes between two blocks, so that running over the end of one never hits another."""


class Fault(AssertionError):
    """What would be a crash, or garbage, on a GPU."""


@dataclass(frozen=True)
class Work:
    """Something in a stream."""

    run: Callable[[], None]
    enqueued: Callable[[], None] = lambda: None
    """Called when it, or a graph that holds it, is enqueued."""


class FakeCuda:
    """`cuda.bindings.runtime` with one GPU. `calls` has the names of all functions called, in order."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)

    def __init__(self, *, late: bool = True, capability: tuple[int, int] = (8, 9), memory: int = 1 << 30) -> None:
        self.calls: list[str] = []
        self.failures: dict[str, int] = {}
        """Function to the error code that it gives."""
        self.last_error = 0
        """Reported by the next kernel, too, until cudaGetLastError is called."""
        self.capturing: list[Work] | None = None
        self.blocks: dict[int, npt.NDArray[np.uint8]] = {}
        self._late, self._capability, self._free = late, capability, memory
        self._hosts: dict[int, Any] = {}
        self._kept: list[Any] = []
        """Host memory that was freed: a stray view of it must not bring down the test run."""
        self._next_address = 1 << 20
        self._streams: set[int] = set()
        self._queue: list[Work] = []
        self._invalidated = False
        self._graphs: dict[int, list[Work]] = {}
        self._handles = iter(range(0x5000, 0x10000))

    def memory(self, address: int, size: int) -> npt.NDArray[np.uint8]:
        """Bytes on the GPU."""
        for start, block in self.blocks.items():
            if start <= address < start + len(block):
                if address + size > start + len(block):
                    raise Fault(f"{size} bytes at {address - start} of a block of {len(block)}")
                return block[address - start : address - start + size]
        raise Fault(f"no memory was allocated at {address:#x}")

    def enqueue(self, stream: int, work: Work) -> None:
        if stream not in self._streams:
            raise Fault(f"{stream} is no stream")
        if self.capturing is not None:
            self.capturing.append(work)
            return
        work.enqueued()
        if self._late:
            self._queue.append(work)
        else:
            work.run()

    def check_released(self) -> None:
        """Raises Fault where something was not given back."""
        left = {
            "device memory": self.blocks,
            "host memory": self._hosts,
            "streams": self._streams,
            "graphs": self._graphs,
            "work": self._queue,
        }
        if kept := [name for name, things in left.items() if things]:
            raise Fault(f"not given back: {', '.join(kept)}")

    def cudaGetErrorName(self, error: int) -> Outcome:
        return 0, f"cudaError{error}".encode()

    def cudaGetErrorString(self, error: int) -> Outcome:
        return 0, f"what {error} means".encode()

    def cudaGetLastError(self) -> Outcome:
        self.calls.append("cudaGetLastError")
        error, self.last_error = self.last_error, 0
        return (error,)

    def cudaDeviceGetAttribute(self, attr: int, device: int) -> Outcome:
        assert device == 0
        return self._outcome("cudaDeviceGetAttribute", self._capability[attr - 75])

    def cudaMemGetInfo(self) -> Outcome:
        return self._outcome("cudaMemGetInfo", self._free, self._free)

    def cudaMalloc(self, size: int) -> Outcome:
        error = self._error("cudaMalloc", breaks_capture=True)
        if error or size > self._free:
            return error or OUT_OF_MEMORY, None
        address, self._next_address = self._next_address, self._next_address + -(-(size + _GAP) // 256) * 256
        self._free -= size
        self.blocks[address] = np.full(size, _NOISE, np.uint8)
        return 0, address

    def cudaFree(self, devPtr: int) -> Outcome:
        if self._queue:
            raise Fault("memory was freed while the stream works")
        error = self._error("cudaFree", breaks_capture=True)
        if not error:
            self._free += len(self.blocks.pop(devPtr))
        return (error,)

    def cudaHostAlloc(self, size: int, flags: int) -> Outcome:
        assert flags == 0
        error = self._error("cudaHostAlloc", breaks_capture=True)
        if error:
            return error, None
        memory = (ctypes.c_uint8 * size)(*[_NOISE] * size)
        self._hosts[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    def cudaFreeHost(self, ptr: int) -> Outcome:
        self._kept.append(self._hosts.pop(ptr))
        return self._outcome("cudaFreeHost")

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: int, stream: int) -> Outcome:
        error = self._error("cudaMemcpyAsync")
        if error:
            return (error,)
        if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice:
            host = self._host(src, count)
            self.memory(dst, count)
            self.enqueue(stream, Work(lambda: _fill(self.memory(dst, count), host)))
        else:
            host = self._host(dst, count)
            self.memory(src, count)
            unread = Work(lambda: _fill(host, self.memory(src, count)), lambda: _fill(host, _NOISE))
            self.enqueue(stream, unread)
        return (0,)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> Outcome:
        error = self._error("cudaMemsetAsync")
        if not error:
            self.enqueue(stream, Work(lambda: _fill(self.memory(devPtr, count), value)))
        return (error,)

    def cudaStreamCreateWithFlags(self, flags: int) -> Outcome:
        assert flags == self.cudaStreamNonBlocking
        error = self._error("cudaStreamCreateWithFlags")
        if error:
            return error, None
        stream = next(self._handles)
        self._streams.add(stream)
        return 0, stream

    def cudaStreamSynchronize(self, stream: int) -> Outcome:
        assert stream in self._streams
        error = self._error("cudaStreamSynchronize", breaks_capture=True)
        if error and self.capturing is None:
            self._queue.clear()  # nothing runs any more after a failure
        while self._queue:
            self._queue.pop(0).run()
        return (error,)

    def cudaStreamDestroy(self, stream: int) -> Outcome:
        self._streams.remove(stream)
        return self._outcome("cudaStreamDestroy")

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Outcome:
        assert stream in self._streams
        assert mode == self.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        error = self._error("cudaStreamBeginCapture")
        if not error:
            self.capturing, self._invalidated = [], False
        return (error,)

    def cudaStreamEndCapture(self, stream: int) -> Outcome:
        assert stream in self._streams
        error = self._error("cudaStreamEndCapture") or (CAPTURE_INVALIDATED if self._invalidated else 0)
        works, self.capturing, self._invalidated = self.capturing, None, False
        if error or works is None:
            self.last_error = error or FAILED
            return self.last_error, None
        return 0, self._graph(works)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Outcome:
        assert flags == 0
        error = self._error("cudaGraphInstantiate")
        return (error, None) if error else (0, self._graph(self._graphs[graph]))

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> Outcome:
        error = self._error("cudaGraphLaunch")
        for work in self._graphs[graphExec] if not error else []:
            self.enqueue(stream, work)
        return (error,)

    def cudaGraphDestroy(self, graph: int) -> Outcome:
        del self._graphs[graph]
        return self._outcome("cudaGraphDestroy")

    def cudaGraphExecDestroy(self, graphExec: int) -> Outcome:
        del self._graphs[graphExec]
        return self._outcome("cudaGraphExecDestroy")

    def _graph(self, works: list[Work]) -> int:
        handle = next(self._handles)
        self._graphs[handle] = works
        return handle

    def _host(self, address: int, size: int) -> npt.NDArray[np.uint8]:
        for start, memory in self._hosts.items():
            if start <= address and address + size <= start + len(memory):
                return np.frombuffer(memory, np.uint8)[address - start : address - start + size]
        raise Fault("a copy from or to host memory that is not pinned, or past its end")

    def _outcome(self, name: str, *result: Any) -> Outcome:
        return (self._error(name), *result)

    def _error(self, name: str, *, breaks_capture: bool = False) -> int:
        self.calls.append(name)
        error = self.failures.get(name, 0)
        if breaks_capture and self.capturing is not None:
            self._invalidated, error = True, NOT_IN_CAPTURE
        self.last_error = error or self.last_error
        return error


def _fill(to: npt.NDArray[np.uint8], value: npt.NDArray[np.uint8] | int) -> None:
    to[...] = value
