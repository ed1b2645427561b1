"""A bundle in ONNX Runtime: KV caches live in fixed buffers and are written in place. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxruntime import InferenceSession, IOBinding, OrtValue

from skipvision.layout import Ints, TokenLayout, read_ids
from skipvision.tiles import Cut
from svcli_engines.base import Logits, Pixels, Visual
from svcli_engines.slots import Slot, SlotPool
from svcli_export.contract import CACHE_PARTS, MOSAIC_INDEX, CachePart, GraphName, past_name, present_name
from svcli_export.feeds import no_visual, prompt_feeds
from svcli_export.manifest import Manifest
from svcli_export.runtime import Provider, open_session, run_vision


class _Shared:
    """What sequences share: the graphs, opened when they are first needed, and the buffers of all their caches."""

    def __init__(
        self, bundle: Path, manifest: Manifest, provider: Provider, num_threads: int | None, num_slots: int
    ) -> None:
        self.contract, self.config = manifest.contract, manifest.config
        self.provider: Provider = provider
        self.load_seconds = 0.0
        self._bundle = bundle
        self._num_threads = num_threads or len(os.sched_getaffinity(0))
        self._sessions: dict[GraphName, InferenceSession] = {}
        self._bindings: dict[tuple[GraphName, int, int], IOBinding] = {}
        self.session("prefill")  # an unusable provider shows here and not in the middle of a chat
        self._slot_shape, self._dtype = self.contract.cache_shape[1:], np.dtype(self.contract.compute_dtype)
        self.caches = {
            (layer, part): OrtValue.ortvalue_from_numpy(np.zeros((num_slots, *self._slot_shape), self._dtype), provider)
            for layer in range(self.contract.num_layers)
            for part in CACHE_PARTS
        }
        """K and V of each layer, [N, G, C, d]."""
        self._logits = np.zeros((num_slots, self.config.text.vocab_size), np.float32)

    def session(self, graph: GraphName) -> InferenceSession:
        if graph not in self._sessions:
            start = perf_counter()
            path = self._bundle / self.contract.graph(graph).file
            self._sessions[graph] = open_session(path, provider=self.provider, num_threads=self._num_threads)
            self.load_seconds += perf_counter() - start
        return self._sessions[graph]

    def run(self, graph: GraphName, feeds: Mapping[str, npt.NDArray[Any]], slots: range) -> npt.NDArray[np.float32]:
        """Logits [n, vocab] of the n sequences in neighbouring `slots`, whose caches are written."""
        session, key = self.session(graph), (graph, slots.start, slots.stop)
        if key not in self._bindings:
            self._bindings[key] = self._bind(session, slots)
        binding = self._bindings[key]
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        session.run_with_iobinding(binding)
        logits: npt.NDArray[np.float32] = self._logits[: len(slots)].copy()
        return logits

    def _bind(self, session: InferenceSession, slots: range) -> IOBinding:
        """What stays from step to step: hundreds of names in a deep model.

        Past and present are the same memory, that of the slots, so that CacheWrite writes rows and copies nothing.
        """
        binding = session.io_binding()
        shape = [len(slots), *self._slot_shape]
        offset = slots.start * int(np.prod(self._slot_shape)) * self._dtype.itemsize
        for (layer, part), cache in self.caches.items():
            place = self.provider, 0, self._dtype.type, shape, cache.data_ptr() + offset
            binding.bind_input(past_name(layer, part), *place)
            binding.bind_output(present_name(layer, part), *place)
        logits = self._logits[: len(slots)]
        binding.bind_output("logits", "cpu", 0, np.float32, list(logits.shape), logits.ctypes.data)
        return binding

    def close(self) -> None:
        self._bindings.clear()
        self._sessions.clear()
        self.caches.clear()


class OnnxSlot(Slot):
    """One sequence of a pool."""

    can_append = True

    def __init__(self, shared: _Shared, number: int) -> None:
        super().__init__(shared.contract.capacity, shared.contract.max_positions)
        self.name = f"onnxruntime-{shared.provider}"
        self.precision: str = shared.contract.precision
        self._shared, self._contract, self._number = shared, shared.contract, number

    @property
    def load_seconds(self) -> float:
        return self._shared.load_seconds

    @property
    def kv_bytes_per_row(self) -> int:
        return self._contract.kv_bytes_per_row

    def encode(self, pixels: Pixels, cut: Cut | None = None) -> Visual:
        shared = self._shared
        return Visual(*run_vision(shared.session("vision"), self._contract, shared.config, pixels, cut))

    def cache_rows(self, layer: int, part: CachePart) -> npt.NDArray[np.float32]:
        """A copy [G, length, d] of the rows in use of one layer's K or V."""
        whole = self._shared.caches[layer, part].numpy()[self._number]
        return whole[:, : self._length].astype(np.float32)  # type: ignore[no-any-return]

    def _write_prompt(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        rows = no_visual(self._contract) if visual is None else visual.rows
        if MOSAIC_INDEX in self._contract.graph("vision").input_names:
            rows = rows.reshape(1, -1, rows.shape[-1])
        feeds: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.array([read_ids(input_ids, self._shared.config.text.vocab_size)], np.int64),
            "visual": rows,
            **prompt_feeds(layout, self._length, self._next_position),
        }
        names = self._contract.graph("prefill").input_names
        return self._run("prefill", {name: feeds[name] for name in feeds if name in names})

    def _write_ids(self, input_ids: Sequence[int]) -> Logits:
        positions = np.arange(self._next_position, self._next_position + len(input_ids), dtype=np.int64)
        feeds = {
            "input_ids": np.array([input_ids], np.int64),
            "position_ids": positions[None],
            "write_index": np.array([self._length], np.int64),
        }
        return self._run("decode", feeds)

    def _run(self, graph: GraphName, feeds: Mapping[str, npt.NDArray[Any]]) -> Logits:
        logits: Logits = self._shared.run(graph, feeds, range(self._number, self._number + 1))[0]
        return logits


class OnnxEngine(OnnxSlot):
    """The default engine: a single sequence. A text-only chat never reads the encoder."""

    def __init__(
        self, bundle: Path, manifest: Manifest, *, provider: Provider = "cpu", num_threads: int | None = None
    ) -> None:
        """`num_threads`: by default as many as this process has cores.

        Raises ProviderError where `provider` cannot be had.
        """
        super().__init__(_Shared(bundle, manifest, provider, num_threads, 1), 0)

    def close(self) -> None:
        super().close()
        self._shared.close()


class OnnxPool(SlotPool[OnnxSlot]):
    """Several sequences on the same graphs, each with a cache of its own."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        provider: Provider = "cpu",
        num_threads: int | None = None,
        num_slots: int,
    ) -> None:
        """Allocates all caches; else as `OnnxEngine`."""
        self._shared = _Shared(bundle, manifest, provider, num_threads, num_slots)
        super().__init__(OnnxSlot(self._shared, number) for number in range(num_slots))

    def close(self) -> None:
        super().close()
        self._shared.close()

    def _decode(self, run: range, rows: Mapping[str, Ints]) -> npt.NDArray[np.float32]:
        return self._shared.run("decode", rows, run)
