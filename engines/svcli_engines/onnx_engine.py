"""A bundle in ONNX Runtime: the KV cache lives in fixed buffers and is written in place. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxruntime import InferenceSession, IOBinding, OrtValue

from skipvision.layout import TokenLayout, read_ids
from skipvision.tiles import Cut
from svcli_engines.base import Logits, Pixels, Visual, check_append, check_extend, check_prefill, check_rewind
from svcli_export.contract import (
    CACHE_PARTS,
    MOSAIC_INDEX,
    CachePart,
    GraphName,
    past_name,
    present_name,
)
from svcli_export.manifest import Manifest
from svcli_export.runtime import Provider, open_session, run_vision


class OnnxEngine:
    """The default engine. Graphs are opened when they are first needed: a text-only chat never reads the encoder."""

    can_append = False

    def __init__(
        self, bundle: Path, manifest: Manifest, *, provider: Provider = "cpu", num_threads: int | None = None
    ) -> None:
        """`num_threads`: by default as many as this process has cores.

        Raises ProviderError where `provider` cannot be had.
        """
        self.name = f"onnxruntime-{provider}"
        self.precision: str = manifest.contract.precision
        self.load_seconds = 0.0
        self._bundle, self._contract, self._config = bundle, manifest.contract, manifest.config
        self._device: Provider = provider
        self._num_threads = num_threads or len(os.sched_getaffinity(0))
        self._sessions: dict[GraphName, InferenceSession] = {}
        self._bindings: dict[GraphName, IOBinding] = {}
        self._length = 0
        self._next_position = 0
        self._session("prefill")  # an unusable provider shows here and not in the middle of a chat
        shape, dtype = self._contract.cache_shape, self._contract.compute_dtype
        self._caches = {
            (layer, part): OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), provider)
            for layer in range(self._contract.num_layers)
            for part in CACHE_PARTS
        }
        vocab = manifest.config.text.vocab_size
        self._logits = OrtValue.ortvalue_from_numpy(np.zeros((1, vocab), np.float32), "cpu")

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
        return Visual(run_vision(self._session("vision"), self._contract, self._config, pixels, cut))

    def prefill(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        check_prefill(layout, visual, self.capacity)
        spec = self._contract.graph("prefill")
        if visual is None:
            shape = next(tensor.shape for tensor in spec.inputs if tensor.name == "visual")
            rows = np.zeros([each if isinstance(each, int) else 0 for each in shape], self._contract.compute_dtype)
        elif MOSAIC_INDEX in self._contract.graph("vision").input_names:
            rows = visual.rows.reshape(1, -1, visual.rows.shape[-1])
        else:
            rows = visual.rows
        feeds = {
            "input_ids": np.array([read_ids(input_ids, self._config.text.vocab_size)], np.int64),
            "visual": rows,
            "source": layout.source[None],
            "position_ids": layout.positions[None],
            "visible_until": layout.visible_until[None],
            "kept_index": np.arange(layout.num_kept, dtype=np.int64)[None],
        }
        logits = self._run("prefill", {name: feeds[name] for name in feeds if name in spec.input_names})
        self._length, self._next_position = layout.num_kept, layout.length
        return logits

    def append(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        check_append(self._length, can_append=self.can_append)
        return self.prefill(input_ids, visual, layout)

    def extend(self, input_ids: Sequence[int]) -> Logits:
        num_new = len(input_ids)
        check_extend(num_new, self._length, self.capacity)
        positions = np.arange(self._next_position, self._next_position + num_new, dtype=np.int64)
        feeds = {
            "input_ids": np.array([input_ids], np.int64),
            "position_ids": positions[None],
            "write_index": np.array([self._length], np.int64),
        }
        logits = self._run("decode", feeds)
        self._length, self._next_position = self._length + num_new, self._next_position + num_new
        return logits

    def cache_rows(self, layer: int, part: CachePart) -> npt.NDArray[np.float32]:
        """A copy [G, length, d] of the rows in use of one layer's K or V."""
        return self._caches[layer, part].numpy()[0, :, : self._length].astype(np.float32)  # type: ignore[no-any-return]

    def rewind(self, num_rows: int, next_position: int) -> None:
        check_rewind(num_rows, self._length)
        self._length, self._next_position = num_rows, next_position

    def reset(self) -> None:
        self._length = self._next_position = 0

    def close(self) -> None:
        self._bindings.clear()
        self._sessions.clear()
        self._caches.clear()

    def _run(self, graph: GraphName, feeds: Mapping[str, npt.NDArray[Any]]) -> Logits:
        """Past and present are the same buffers, so that TensorScatter writes rows and copies nothing."""
        session = self._session(graph)
        if graph not in self._bindings:
            self._bindings[graph] = self._bind(session)
        binding = self._bindings[graph]
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        session.run_with_iobinding(binding)
        logits: Logits = self._logits.numpy()[0].copy()
        return logits

    def _bind(self, session: InferenceSession) -> IOBinding:
        """What stays from step to step: hundreds of names in a deep model."""
        binding = session.io_binding()
        for (layer, part), cache in self._caches.items():
            binding.bind_ortvalue_input(past_name(layer, part), cache)
            binding.bind_ortvalue_output(present_name(layer, part), cache)
        binding.bind_ortvalue_output("logits", self._logits)
        return binding

    def _session(self, graph: GraphName) -> InferenceSession:
        if graph not in self._sessions:
            start = perf_counter()
            path = self._bundle / self._contract.graph(graph).file
            self._sessions[graph] = open_session(path, provider=self._device, num_threads=self._num_threads)
            self.load_seconds += perf_counter() - start
        return self._sessions[graph]
