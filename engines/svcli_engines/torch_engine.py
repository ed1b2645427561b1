"""A model in PyTorch behind the engine protocol: the reference on the CPU, and the road that any CUDA GPU has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from skipvision.cost import kv_bytes
from skipvision.layout import BatchLayout, TokenLayout, read_ids
from skipvision.tiles import Cut
from svcli_engines.base import (
    Logits,
    MachineError,
    Pixels,
    Visual,
    check_extend,
    check_prefill,
    check_rewind,
)
from svcli_engines.torch_steps import Step, capture, compile_step, is_compilers, reason
from svcli_export.contract import CachePart
from svcli_export.manifest import Manifest

if TYPE_CHECKING:
    import torch

    from skipvision.model import SkipVisionModel

Device = Literal["cpu", "cuda"]
TorchPrecision = Literal["fp32", "fp16", "bf16"]

_WARM_UP = 2
"""Steps that run before one is captured: libraries set themselves up in the first ones."""


class TorchEngine:
    """Importing this module loads no torch; making an engine does.

    On CUDA single ids are decoded by a captured graph. The CUDA part was written without a GPU and never run on one.
    """

    can_append = True

    def __init__(
        self,
        model: SkipVisionModel,
        *,
        capacity: int,
        device: Device = "cpu",
        precision: TorchPrecision = "fp32",
        compiled: bool = False,
        started: float | None = None,
    ) -> None:
        """Takes the model for its own: it is moved and rounded in place. `capacity`: rows of the KV cache.

        `compiled`: by torch.compile, which takes its time at the first new id. `started`: when loading the model began,
        by `perf_counter`. Raises MachineError for `cuda` where PyTorch finds none.
        """
        start = perf_counter() if started is None else started
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise MachineError("this PyTorch finds no CUDA; see what `svcli doctor` says, or use the CPU")
        if device == "cuda" and precision == "fp32":
            torch.backends.cudnn.allow_tf32 = False  # on by default, with 10 bits of mantissa
        self.name = f"torch-{device}"
        self.precision = str(precision)
        self.decode_mode = "eager" if device == "cpu" else "warming up"
        """How single ids are decoded: `eager`, `warming up`, `graph`, or `eager: ` and why there is no graph."""
        self.code = "compiled" if compiled else "as written"
        """Of that step: `as written`, `compiled`, or `as written: ` and why it is not compiled."""
        dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        self._device, self._dtype = torch.device(device), dtypes[precision]
        self._model = model.to(self._device, self._dtype)
        self._capacity = capacity
        self._cache = self._model.new_cache(1, capacity)
        self._length = self._next_position = 0
        self._num_steps = 0
        self._replay: Step | None = None
        self._compiled_step = compile_step(self._step) if compiled else None
        self._next_id = torch.zeros((1, 1), dtype=torch.long, device=self._device)
        self._step_logits = torch.zeros(model.config.text.vocab_size, dtype=self._dtype, device=self._device)
        self.load_seconds = perf_counter() - start

    @classmethod
    def of_bundle(
        cls,
        bundle: Path,
        manifest: Manifest,
        *,
        checkpoint: Path | None = None,
        device: Device = "cpu",
        compiled: bool = False,
    ) -> TorchEngine:
        """The model of a bundle, by the bundle's own weights, or by those of the `checkpoint` that it was made from.

        In fp32, on CUDA in fp16 where the bundle computes in that, which a CPU does slowly.

        Raises BundleError or CheckpointError where they are unusable, MachineError as above.
        """
        start = perf_counter()
        from svcli_export.restore import original_model, restore_model

        model = restore_model(bundle, manifest) if checkpoint is None else original_model(checkpoint, manifest)
        contract = manifest.contract
        precision: TorchPrecision = "fp16" if device == "cuda" and contract.compute_dtype == "float16" else "fp32"
        return cls(
            model,
            capacity=contract.capacity,
            device=device,
            precision=precision,
            compiled=compiled,
            started=start,
        )

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def kv_bytes_per_row(self) -> int:
        return kv_bytes(self._model.config.text, 1, bytes_per_element=self._dtype.itemsize)

    @property
    def length(self) -> int:
        return self._length

    @property
    def next_position(self) -> int:
        return self._next_position

    def encode(self, pixels: Pixels, cut: Cut | None = None) -> Visual:
        import torch

        given = torch.from_numpy(pixels).to(self._device, self._dtype)
        with torch.no_grad():
            tokens, paid = self._model.picture_tokens(given, cut)
            chosen = self._model.select(paid)
            rows = self._model.arrange(tokens, chosen)
            is_choice = chosen is not None and self._model.config.skip.selector != "first"
        return Visual(_numpy(rows), chosen[0].cpu().numpy() if is_choice else None)

    def prefill(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        return self._fill(input_ids, visual, layout, 0, 0)

    def append(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        return self._fill(input_ids, visual, layout, self._length, self._next_position)

    def _fill(
        self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout, length: int, next_position: int
    ) -> Logits:
        """The rows of `layout` behind the first `length` rows of the cache."""
        import torch

        from skipvision.model import BatchTensors

        check_prefill(layout, visual, self._capacity, length)
        width = self._model.config.text.hidden_size
        rows = torch.from_numpy(np.zeros((0, 1, width), np.float32) if visual is None else visual.rows).to(self._device)
        batch = BatchTensors.of(BatchLayout.of([layout], len(input_ids)), self._device)
        ids = read_ids(input_ids, self._model.config.text.vocab_size)
        self._keep(length, next_position)
        logits = self._model.append(torch.tensor([ids], device=self._device), rows, batch, self._cache, length)
        self._length, self._next_position = length + layout.num_kept, next_position + layout.length
        return _numpy(logits[0])

    def extend(self, input_ids: Sequence[int]) -> Logits:
        import torch

        check_extend(len(input_ids), self._length, self._capacity)
        with torch.no_grad():
            if len(input_ids) == 1:
                logits = self._one(input_ids[0])
            else:
                logits = self._advance(torch.tensor([input_ids], device=self._device))
        self._length += len(input_ids)
        self._next_position += len(input_ids)
        return _numpy(logits)

    def cache_rows(self, layer: int, part: CachePart) -> npt.NDArray[np.float32]:
        """A copy [G, length, d] of the rows in use of one layer's K or V."""
        buffers = self._cache.keys if part == "key" else self._cache.values
        rows: npt.NDArray[np.float32] = _numpy(buffers[layer][0, :, : self._length]).copy()
        return rows

    def rewind(self, num_rows: int, next_position: int) -> None:
        check_rewind(num_rows, self._length)
        self._keep(num_rows, next_position)

    def _keep(self, num_rows: int, next_position: int) -> None:
        self._cache.lengths.fill_(num_rows)
        self._cache.next_positions.fill_(next_position)
        self._length, self._next_position = num_rows, next_position

    def reset(self) -> None:
        self._length = self._next_position = 0

    def close(self) -> None:
        import torch

        self._length = self._next_position = 0
        if self.__dict__.get("_compiled_step") is not None:
            torch.compiler.reset()  # which counts the engines that one step was compiled for
        for held in ("_model", "_cache", "_replay", "_compiled_step", "_next_id", "_step_logits"):
            self.__dict__.pop(held, None)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # or else torch keeps it for itself

    def _advance(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [vocab] of the last of the new ids [1, n]. Every tensor of the cache stays where it is."""
        decoder = self._model.decoder
        return decoder.logits(decoder.extend(decoder.embed(input_ids), self._cache))[0, -1]

    def _one(self, token: int) -> torch.Tensor:
        """Logits [vocab] of one new id, by a graph as soon as there is one."""
        self._next_id.fill_(token)
        if self._num_steps == _WARM_UP and self.decode_mode == "warming up":
            self._capture()
        self._num_steps += 1
        (self._replay or self._run_step)()
        return self._step_logits.clone()

    def _run_step(self) -> None:
        if self._compiled_step is not None:
            try:
                self._compiled_step()
                return
            except Exception as error:
                if not is_compilers(error):
                    raise
                self._compiled_step = None
                self.code = f"as written: {reason(error)}"
        self._step()

    def _step(self) -> None:
        self._step_logits.copy_(self._advance(self._next_id))

    def _capture(self) -> None:
        try:
            self._replay = capture(self._run_step)
            self.decode_mode = "graph"
        except RuntimeError as error:  # what torch raises for CUDA's errors
            self.decode_mode = f"eager: {reason(error)}"


def _numpy(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    """In fp32, since numpy has no bf16; exact for the other way round as well."""
    return np.asarray(tensor.float().cpu().numpy(), np.float32)
