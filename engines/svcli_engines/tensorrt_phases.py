"""A bundle's plans on the first GPU: fixed buffers, KV caches in place, one id of several sequences as a CUDA graph.

Imports neither torch nor TensorRT; opening plans imports the latter, and cuda-python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from svcli_engines.base import EngineError
from svcli_engines.cuda import Cuda, CudaRuntime
from svcli_engines.plans import (
    PLACES,
    Backend,
    PlanPhase,
    PlanRecord,
    PlanSet,
    RuntimeFacts,
    check_fits,
    check_sequences,
    load_record,
    phase_spec,
)
from svcli_engines.plugins.compile import cache_folder
from svcli_engines.slots import batch_sizes, check_memory
from svcli_engines.tensorrt_runtime import STORAGE, LoadedPlan, Phase, Shape, TensorRT, num_bytes
from svcli_export.contract import CACHE_PARTS, past_name, present_name
from svcli_export.manifest import Manifest

Array = npt.NDArray[Any]

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


@dataclass
class Step:
    """One id in each of the first slots. What a graph was captured from must not change, so each has its context."""

    phase: Phase
    mode: str = "warming up"
    """`warming up`, `graph`, or `eager: ` and why there is no graph."""
    graph: Any = None
    num_runs: int = 0


class OpenPlans:
    """One plan set, and all that it works on: everything is loaded and allocated at the start."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        backend: Backend,
        check_files: bool,
        tensorrt: Any,
        cuda: CudaRuntime | None,
        num_slots: int | None,
    ) -> None:
        """`num_slots`: caches; as many as decode runs at once if None. Raises MachineError, PlanError."""
        self.contract = manifest.contract
        self._phases: dict[PlanPhase, Phase] = {}
        self.steps: dict[int, Step] = {}
        """By the number of slots, from the first on."""
        self._places: dict[PlanPhase, int] = {}
        """Slot whose cache a phase is bound to."""
        self._cache_host: Array | None = None
        self._tensorrt: TensorRT | None = None
        self._cuda = Cuda(cuda)
        try:
            self._tensorrt = runtime = TensorRT(backend, self._cuda, tensorrt)
            plans = PlanSet(bundle, backend, self._cuda.target)
            record = load_record(plans)
            plans = plans.as_built(record, self.contract)
            facts = RuntimeFacts(backend, runtime.version, self._cuda.target)
            check_fits(plans, record, manifest, facts, check_files=check_files)
            self.num_slots = num_slots or record.num_sequences
            check_sequences(plans, record, self.num_slots)
            built = hashlib.sha256("".join(plan.sha256 for plan in record.plans.values()).encode()).hexdigest()
            runtime.keep_kernels(cache_folder() / f"{plans.folder.name}-{runtime.version}-{built[:16]}.bin")
            loaded = {file: LoadedPlan(plans, file, runtime.load(plans, file)) for file in record.plans}
            self._prepare(runtime, loaded, record)
        except BaseException:
            self.close()
            raise
        self.name, self.precision = f"{backend}-{self._cuda.target}", str(record.precision)
        self.can_append = record.layout == "shared"
        """Where prefill and decode share a plan, which is prefill behind a cache."""

    def largest(self, phase: PlanPhase, name: str) -> Shape:
        """What an input of a phase may be."""
        return self._phases[phase].ranges[name][1]

    def run(
        self,
        name: PlanPhase,
        feeds: Mapping[str, Array],
        outputs: Sequence[str] = ("logits",),
        count: int = 1,
        slots: range = range(1),
    ) -> list[Array]:
        """Runs a phase on the caches of neighbouring `slots`: its outputs, each [count, ...]."""
        phase = self._phases[name]
        if self._places[name] != slots.start:
            self._places[name] = -1  # which stays where it is refused halfway
            phase.bind(self._cache_addresses(slots.start))
            self._places[name] = slots.start
        phase.set_shapes(phase.shapes(feeds, len(slots)))
        staged, results = self._stage(phase, feeds), self._results(phase, outputs, count)
        self._submit(phase, staged, results)
        return self._finish(results)

    def decode(self, slots: range, feeds: Mapping[str, Array]) -> Array:
        """Logits [n, vocab] of one id in each of n neighbouring slots.

        For the first slots, and a number of them that there is a step for, after the warm-up a captured graph does it.
        """
        if slots.start == 0 and slots.stop in self.steps:
            return self._run_step(self.steps[slots.stop], feeds, slots.stop)
        (logits,) = self.run("decode" if len(slots) == 1 else "batch", feeds, count=len(slots), slots=slots)
        return logits

    def cache(self, name: str, slot: int) -> Array:
        """The cache [G, C, d] of one slot, which stays until the next is asked for."""
        shape, dtype = self.contract.cache_shape, self.contract.compute_dtype
        if self._cache_host is None:  # for comparing engines only, so not at the start
            self._cache_host = self._cuda.allocate_host(num_bytes(shape, dtype))
        rows = Buffer(self._cache_addresses(slot)[name], self._cache_host).view(shape, dtype)
        self._cuda.to_host(rows, self._cache_addresses(slot)[name])
        self._cuda.synchronize()
        return rows.reshape(shape[1:])

    def close(self) -> None:
        self._cuda.drain()
        if self._tensorrt is not None:
            self._tensorrt.close()
            self._tensorrt = None
        self._phases.clear()
        self.steps.clear()
        self._cuda.close()

    def _prepare(self, runtime: TensorRT, loaded: Mapping[str, LoadedPlan], record: PlanRecord) -> None:
        """Makes the contexts, and all memory that they work on."""
        contract = self.contract
        each = [(layer, part) for layer in range(contract.num_layers) for part in CACHE_PARTS]
        caches = {past_name(layer, part): present_name(layer, part) for layer, part in each}
        self._slot_bytes = num_bytes(contract.cache_shape, contract.compute_dtype)
        # One phase runs at a time, so all contexts work in the same memory.
        scratch_size = max(_SMALLEST, *(plan.scratch_size for plan in loaded.values()))
        kv_bytes = self.num_slots * len(caches) * self._slot_bytes
        check_memory(self.num_slots, kv_bytes + scratch_size, self._cuda.free_bytes)
        scratch = self._cuda.allocate(scratch_size), scratch_size

        def context(phase: PlanPhase, *, captured: bool = False) -> Phase:
            file, profile = PLACES[record.layout][phase]
            spec = phase_spec(contract, record.layout, phase, record.num_sequences)
            return Phase(runtime, loaded[file], profile, spec, caches, scratch, captured=captured)

        batch: tuple[PlanPhase, ...] = ("batch",) if self.num_slots > 1 else ()
        for name in ("vision", "prefill", "decode", *batch):
            self._phases[name] = context(name)
        for size in batch_sizes(self.num_slots):
            self.steps[size] = Step(context("decode" if size == 1 else "batch", captured=True))
        phases = [*self._phases.values(), *(step.phase for step in self.steps.values())]
        self._buffers = self._allocate(phases)
        self._caches = {}
        for past, present in caches.items():
            self._caches[past] = self._caches[present] = self._cuda.allocate(self.num_slots * self._slot_bytes)
        for phase in phases:
            phase.bind({name: buffer.address for name, buffer in self._buffers.items()} | self._caches)
        self._places = dict.fromkeys(self._phases, 0)
        for size, step in self.steps.items():
            least = step.phase.shapes({})
            step.phase.set_shapes({name: (size, *shape[1:]) for name, shape in least.items()})
        self._cuda.synchronize()

    def _cache_addresses(self, slot: int) -> dict[str, int]:
        """Of one slot, by the names of the tensors; those behind it follow."""
        return {name: address + slot * self._slot_bytes for name, address in self._caches.items()}

    def _allocate(self, phases: Sequence[Phase]) -> dict[str, Buffer]:
        """One buffer for each tensor that is no cache, large enough for every phase that has it."""
        sizes: dict[str, int] = {}
        for phase in phases:
            for name, size in phase.sizes().items():
                sizes[name] = max(sizes.get(name, 0), size)
        return {name: Buffer(self._cuda.allocate(size), self._cuda.allocate_host(size)) for name, size in sizes.items()}

    def _run_step(self, step: Step, feeds: Mapping[str, Array], count: int) -> Array:
        """Its inputs have fixed places, so that a captured graph does it all."""
        staged, results = self._stage(step.phase, feeds), self._results(step.phase, ("logits",), count)
        if step.num_runs == _WARM_UP:
            self._capture(step, staged, results)
        step.num_runs += 1
        if step.graph is None:
            self._submit(step.phase, staged, results)
        else:
            self._cuda.launch(step.graph)
        return self._finish(results)[0]

    def _capture(self, step: Step, staged: Mapping[str, Array], results: Mapping[str, Array]) -> None:
        """Makes a graph of one step, copies included. Where that fails, `mode` says why."""
        if not step.phase.capturable():
            step.mode = "eager: TensorRT cannot record this plan"
            return
        try:
            self._cuda.begin_capture()
            self._submit(step.phase, staged, results)
            step.graph = self._cuda.end_capture()
            step.mode = "graph"
        except EngineError as error:
            self._cuda.abandon_capture()
            step.mode = f"eager: {error}"
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
