"""A bundle's plans in TensorRT or TensorRT-RTX: fixed buffers, the KV cache in place, one id as a CUDA graph.

Imports neither torch nor TensorRT; making an engine imports the latter, and cuda-python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from skipvision.layout import FOREVER, TokenLayout
from skipvision.tiles import Cut
from svcli_engines.base import (
    EngineError,
    Logits,
    Pixels,
    Visual,
    check_append,
    check_extend,
    check_positions,
    check_prefill,
    check_rewind,
)
from svcli_engines.cuda import Cuda, CudaRuntime
from svcli_engines.plans import (
    PLACES,
    Backend,
    EngineLayout,
    PlanSet,
    RuntimeFacts,
    check_fits,
    load_record,
    phase_spec,
)
from svcli_engines.plugins.compile import cache_folder
from svcli_engines.tensorrt_runtime import STORAGE, LoadedPlan, Phase, Shape, TensorRT, num_bytes
from svcli_export.contract import CACHE_PARTS, CachePart, GraphName, past_name, present_name
from svcli_export.feeds import prompt_feeds
from svcli_export.manifest import Manifest

Array = npt.NDArray[Any]
PhaseName = Literal["vision", "prefill", "decode", "step"]

_GRAPHS: dict[PhaseName, GraphName] = {"vision": "vision", "prefill": "prefill", "decode": "decode", "step": "decode"}
"""What a graph was captured from must not change any more, so single ids have a context of their own: `step`."""
_WARM_UP = 2
"""Steps that run before one is captured: a plan leaves work of its own to its first runs."""
_SMALLEST = 256
"""Bytes of scratch memory where no plan wants any: its address must still be one."""


@dataclass(frozen=True)
class Buffer:
    """A tensor's memory on the GPU, and where the CPU prepares or reads it."""

    address: int
    host: Array
    """Bytes."""

    def view(self, shape: Shape, dtype: str) -> Array:
        """A tensor at the start of `host`."""
        return self.host[: num_bytes(shape, dtype)].view(STORAGE[dtype]).reshape(shape)


class TensorRTEngine:
    """One plan set on the first GPU. Everything is loaded and allocated when the engine is made."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        backend: Backend = "tensorrt",
        check_files: bool = True,
        tensorrt: Any = None,
        cuda: CudaRuntime | None = None,
    ) -> None:
        """`check_files`: hash the plans first. `tensorrt`, `cuda`: modules to use instead of those installed.

        Raises MachineError where TensorRT, CUDA or a GPU is missing or memory is short, PlanError for plans that do
        not fit.
        """
        start = perf_counter()
        self._contract = manifest.contract
        self.can_append = False
        """Where prefill and decode share a plan, which is prefill behind a cache."""
        self._phases: dict[PhaseName, Phase] = {}
        self._tensorrt: TensorRT | None = None
        self._cuda = Cuda(cuda)
        try:
            self._tensorrt = runtime = TensorRT(backend, self._cuda, tensorrt)
            plans = PlanSet(bundle, backend, self._cuda.target)
            record = load_record(plans)
            plans = plans.as_built(record, self._contract)
            facts = RuntimeFacts(backend, runtime.version, self._cuda.target)
            check_fits(plans, record, manifest, facts, check_files=check_files)
            built = hashlib.sha256("".join(plan.sha256 for plan in record.plans.values()).encode()).hexdigest()
            runtime.keep_kernels(cache_folder() / f"{plans.folder.name}-{runtime.version}-{built[:16]}.bin")
            loaded = {file: LoadedPlan(plans, file, runtime.load(plans, file)) for file in record.plans}
            self._prepare(runtime, loaded, record.layout)
            self.can_append = record.layout == "shared"
        except BaseException:
            self.close()
            raise
        self.name, self.precision = f"{backend}-{self._cuda.target}", str(record.precision)
        self.decode_mode = "warming up"
        """How single ids are decoded: `warming up`, `graph`, or `eager: ` and why there is no graph."""
        self._graph: Any = None
        self._cache_host: Array | None = None
        self._num_steps = 0
        self._length = self._next_position = 0
        self.load_seconds = perf_counter() - start

    @property
    def capacity(self) -> int:
        return self._contract.capacity

    @property
    def kv_bytes_per_row(self) -> int:
        return self._contract.kv_bytes_per_row

    @property
    def length(self) -> int:
        return self._length

    @property
    def next_position(self) -> int:
        return self._next_position

    def encode(self, pixels: Pixels, cut: Cut | None = None) -> Visual:
        if cut is not None and cut.rows:
            raise EngineError("plans for pictures in tiles are not there yet")
        most = self._phases["vision"].ranges["pixels"][1][0]
        parts = [pixels[first : first + most] for first in range(0, len(pixels), most)]
        names = self._contract.graph("vision").output_names
        runs = [self._run("vision", {"pixels": part}, names, len(part)) for part in parts]
        return Visual(*(np.concatenate(outputs) for outputs in zip(*runs, strict=True)))

    def prefill(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        return self._fill(input_ids, visual, layout, 0, 0)

    def append(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        check_append(self._length, can_append=self.can_append)
        return self._fill(input_ids, visual, layout, self._length, self._next_position)

    def _fill(
        self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout, length: int, next_position: int
    ) -> Logits:
        """The rows of `layout` behind the first `length` rows of the cache."""
        check_prefill(layout, visual, self.capacity, length)
        check_positions(next_position + layout.length, self._contract.max_positions)
        self._length, self._next_position = length, next_position
        feeds: dict[str, Array] = {
            "input_ids": np.array([input_ids], np.int64),
            **prompt_feeds(layout, length, next_position),
        }
        if visual is not None and len(visual.rows) > 0:
            feeds["visual"] = visual.rows
        logits: Logits = self._run("prefill", feeds)[0][0]
        self._length, self._next_position = length + layout.num_kept, next_position + layout.length
        return logits

    def extend(self, input_ids: Sequence[int]) -> Logits:
        check_extend(len(input_ids), self._length, self.capacity)
        check_positions(self._next_position + len(input_ids), self._contract.max_positions)
        most = self._phases["decode"].ranges["input_ids"][1][1]
        for first in range(0, len(input_ids), most):
            ids = input_ids[first : first + most]
            feeds = self._decode_feeds(ids)
            logits: Logits = (self._run_step(feeds) if len(ids) == 1 else self._run("decode", feeds))[0][0]
            self._length, self._next_position = self._length + len(ids), self._next_position + len(ids)
        return logits

    def cache_rows(self, layer: int, part: CachePart) -> npt.NDArray[np.float32]:
        """A copy [G, length, d] of the rows in use of one layer's K or V."""
        shape, dtype = self._contract.cache_shape, self._contract.compute_dtype
        if self._cache_host is None:  # for comparing engines only, so not at the start
            self._cache_host = self._cuda.allocate_host(num_bytes(shape, dtype))
        whole = Buffer(self._addresses[past_name(layer, part)], self._cache_host)
        rows = whole.view(shape, dtype)
        self._cuda.to_host(rows, whole.address)
        self._cuda.synchronize()
        used: npt.NDArray[np.float32] = rows[0, :, : self._length].astype(np.float32)
        return used

    def rewind(self, num_rows: int, next_position: int) -> None:
        check_rewind(num_rows, self._length)
        self._length, self._next_position = num_rows, next_position

    def reset(self) -> None:
        self._length = self._next_position = 0

    def close(self) -> None:
        self._cuda.drain()
        if self._tensorrt is not None:
            self._tensorrt.close()
            self._tensorrt = None
        self._phases.clear()
        self._cuda.close()

    def _prepare(self, runtime: TensorRT, loaded: Mapping[str, LoadedPlan], layout: EngineLayout) -> None:
        """Makes the contexts, and all memory that they work on."""
        contract = self._contract
        each = [(layer, part) for layer in range(contract.num_layers) for part in CACHE_PARTS]
        caches = {past_name(layer, part): present_name(layer, part) for layer, part in each}
        # One phase runs at a time, so all contexts work in the same memory.
        scratch_size = max(_SMALLEST, *(plan.scratch_size for plan in loaded.values()))
        scratch = self._cuda.allocate(scratch_size), scratch_size
        for name, graph in _GRAPHS.items():
            file, profile = PLACES[layout][graph]
            spec = phase_spec(contract, layout, graph)
            captured = name == "step"
            self._phases[name] = Phase(runtime, loaded[file], profile, spec, caches, scratch, captured=captured)
        self._buffers = self._allocate()
        self._addresses = {name: buffer.address for name, buffer in self._buffers.items()}
        for past, present in caches.items():
            cache = self._cuda.allocate(num_bytes(contract.cache_shape, contract.compute_dtype))
            self._addresses[past] = self._addresses[present] = cache
        for phase in self._phases.values():
            phase.bind(self._addresses)
        self._phases["step"].set_shapes(self._phases["step"].shapes({}))
        self._cuda.synchronize()

    def _allocate(self) -> dict[str, Buffer]:
        """One buffer for each tensor that is no cache, large enough for every phase that has it."""
        sizes: dict[str, int] = {}
        for phase in self._phases.values():
            for name, size in phase.sizes().items():
                sizes[name] = max(sizes.get(name, 0), size)
        return {name: Buffer(self._cuda.allocate(size), self._cuda.allocate_host(size)) for name, size in sizes.items()}

    def _decode_feeds(self, input_ids: Sequence[int]) -> dict[str, Array]:
        """The decode plan has the first three; the shared decoder takes new ids as a prompt without pictures."""
        rows = np.arange(len(input_ids), dtype=np.int64)
        return {
            "input_ids": np.array([input_ids], np.int64),
            "position_ids": (self._next_position + rows)[None],
            "write_index": np.array([self._length], np.int64),
            "source": rows[None],
            "visible_until": np.full_like(rows, FOREVER)[None],
            "kept_index": rows[None],
        }

    def _run(
        self, name: PhaseName, feeds: Mapping[str, Array], outputs: Sequence[str] = ("logits",), count: int = 1
    ) -> list[Array]:
        """Runs a phase: its outputs, each [count, ...]."""
        phase = self._phases[name]
        phase.set_shapes(phase.shapes(feeds))
        staged, results = self._stage(phase, feeds), self._results(phase, outputs, count)
        self._submit(phase, staged, results)
        return self._finish(results)

    def _run_step(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Runs one id. Its inputs have fixed places, so that after the warm-up a captured graph does it all."""
        phase = self._phases["step"]
        staged, results = self._stage(phase, feeds), self._results(phase, ("logits",), 1)
        if self._num_steps == _WARM_UP:
            self._capture(phase, staged, results)
        self._num_steps += 1
        if self._graph is None:
            self._submit(phase, staged, results)
        else:
            self._cuda.launch(self._graph)
        return self._finish(results)

    def _capture(self, phase: Phase, staged: Mapping[str, Array], results: Mapping[str, Array]) -> None:
        """Makes a graph of one step, copies included. Where that fails, `decode_mode` says why."""
        if not phase.capturable():
            self.decode_mode = "eager: TensorRT cannot record this plan"
            return
        try:
            self._cuda.begin_capture()
            self._submit(phase, staged, results)
            self._graph = self._cuda.end_capture()
            self.decode_mode = "graph"
        except EngineError as error:
            self._cuda.abandon_capture()
            self.decode_mode = f"eager: {error}"
        except BaseException:
            self._cuda.abandon_capture()
            raise

    def _stage(self, phase: Phase, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Those of `feeds` that the phase takes, in its dtypes, where the GPU can fetch them."""
        staged = {}
        for name in (name for name in phase.fed if name in feeds):
            staged[name] = self._buffers[name].view(feeds[name].shape, phase.dtype(name))
            staged[name][...] = feeds[name]
        return staged

    def _results(self, phase: Phase, outputs: Sequence[str], count: int) -> dict[str, Array]:
        """Where the CPU will read outputs."""
        shapes = {name: (count, *phase.output_shape(name)[1:]) for name in outputs}
        return {name: self._buffers[name].view(shape, phase.dtype(name)) for name, shape in shapes.items()}

    def _submit(self, phase: Phase, staged: Mapping[str, Array], results: Mapping[str, Array]) -> None:
        """Enqueues copies in, one run, and copies out."""
        for name, value in staged.items():
            self._cuda.to_device(self._buffers[name].address, value)
        phase.enqueue()
        for name, result in results.items():
            self._cuda.to_host(result, self._buffers[name].address)

    def _finish(self, results: Mapping[str, Array]) -> list[Array]:
        """Waits, and takes the results out of the buffers that the next run writes."""
        self._cuda.synchronize()
        return [result.copy() for result in results.values()]
