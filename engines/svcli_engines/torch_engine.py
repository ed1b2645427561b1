"""A model in PyTorch behind the engine protocol: the reference on the CPU, and the road that any CUDA GPU has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from skipvision.cost import kv_bytes
from skipvision.layout import FOREVER, BatchLayout, Ints, TokenLayout, read_ids
from skipvision.tiles import Cut
from svcli_engines.base import Logits, MachineError, Pixels, Visual
from svcli_engines.slots import Slot, SlotPool, batch_sizes, check_memory
from svcli_engines.torch_steps import DecodeStep
from svcli_export.contract import CachePart
from svcli_export.manifest import Manifest

if TYPE_CHECKING:
    import torch

    from skipvision.decoder import KVCache
    from skipvision.model import SkipVisionModel

Device = Literal["cpu", "cuda"]
TorchPrecision = Literal["fp32", "fp16", "bf16"]


class _Shared:
    """What sequences share: the model, the buffers of all their caches, and steps over the first of them."""

    def __init__(
        self,
        model: SkipVisionModel,
        *,
        capacity: int,
        num_slots: int,
        device: Device,
        precision: TorchPrecision,
        compiled: bool,
        started: float | None,
    ) -> None:
        start = perf_counter() if started is None else started
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise MachineError("this PyTorch finds no CUDA; see what `svcli doctor` says, or use the CPU")
        if device == "cuda" and precision == "fp32":
            torch.backends.cudnn.allow_tf32 = False  # on by default, with 10 bits of mantissa
        dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        self.device, self.precision, self.capacity = torch.device(device), precision, capacity
        self._dtype, self._compiled = dtypes[precision], compiled
        self.model = model.to(self.device, self._dtype)
        if device == "cuda":
            check_memory(num_slots, num_slots * capacity * self.kv_bytes_per_row, torch.cuda.mem_get_info()[0])
        self.cache = self.model.new_cache(num_slots, capacity)
        sizes = batch_sizes(num_slots) if device == "cuda" or compiled else (1,)
        self.steps = {size: DecodeStep(self.model.decoder, self.part(range(size)), compiled=compiled) for size in sizes}
        """By the number of slots, from the first on."""
        self.load_seconds = perf_counter() - start

    @property
    def kv_bytes_per_row(self) -> int:
        return kv_bytes(self.model.config.text, 1, bytes_per_element=self._dtype.itemsize)

    def part(self, slots: range, length: int = 0, next_position: int = 0) -> KVCache:
        """The buffers of neighbouring slots, all of which have so many rows."""
        from skipvision.decoder import KVCache

        keys, values = (
            [buffer[slots.start : slots.stop] for buffer in buffers] for buffers in (self.cache.keys, self.cache.values)
        )
        count = self.cache.lengths.new_full
        return KVCache(keys, values, count((len(slots),), length), count((len(slots),), next_position))

    def decode(self, slots: range, rows: Mapping[str, Ints]) -> npt.NDArray[np.float32]:
        """Logits [n, vocab] of one id in each of n neighbouring slots; `rows` as the decode graph takes them."""
        import torch

        given = {name: torch.from_numpy(value) for name, value in rows.items()}
        if slots.start == 0 and slots.stop in self.steps:
            with torch.no_grad():
                return _numpy(self.steps[slots.stop](given))
        cache = self.part(slots)
        cache.lengths.copy_(given["write_index"])
        cache.next_positions.copy_(given["position_ids"][:, 0])
        return _numpy(self.model.decode(given["input_ids"].to(self.device), cache)[:, -1])

    def close(self) -> None:
        import torch

        if self._compiled:
            torch.compiler.reset()  # which counts the engines that one step was compiled for
        for held in ("model", "cache", "steps"):
            self.__dict__.pop(held, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # or else torch keeps it for itself


class TorchSlot(Slot):
    """One sequence of a pool."""

    can_append = True

    def __init__(self, shared: _Shared, number: int) -> None:
        super().__init__(shared.capacity, FOREVER)
        self.name = f"torch-{shared.device.type}"
        self.precision = str(shared.precision)
        self._shared, self._place = shared, range(number, number + 1)

    @property
    def load_seconds(self) -> float:
        return self._shared.load_seconds

    @property
    def kv_bytes_per_row(self) -> int:
        return self._shared.kv_bytes_per_row

    def encode(self, pixels: Pixels, cut: Cut | None = None) -> Visual:
        import torch

        model = self._shared.model
        given, skip = torch.from_numpy(pixels).to(self._shared.cache.keys[0]), model.config.skip
        with torch.no_grad():
            tokens, paid = model.picture_tokens(given, cut)
            chosen = model.select(paid)
            rows = model.arrange(tokens, chosen)
        if chosen is None or skip is None or skip.selector == "first":
            return Visual(_numpy(rows))
        return Visual(_numpy(rows), chosen[0].cpu().numpy())

    def cache_rows(self, layer: int, part: CachePart) -> npt.NDArray[np.float32]:
        """A copy [G, length, d] of the rows in use of one layer's K or V."""
        cache = self._shared.cache
        buffers = cache.keys if part == "key" else cache.values
        rows: npt.NDArray[np.float32] = _numpy(buffers[layer][self._place.start, :, : self._length]).copy()
        return rows

    def _write_prompt(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        import torch

        from skipvision.model import BatchTensors

        model, device = self._shared.model, self._shared.device
        width = model.config.text.hidden_size
        rows = torch.from_numpy(np.zeros((0, 1, width), np.float32) if visual is None else visual.rows).to(device)
        batch = BatchTensors.of(BatchLayout.of([layout], len(input_ids)), device)
        ids = torch.tensor([read_ids(input_ids, model.config.text.vocab_size)], device=device)
        cache = self._shared.part(self._place, self._length, self._next_position)
        return _numpy(model.append(ids, rows, batch, cache, self._length)[0])

    def _write_ids(self, input_ids: Sequence[int]) -> Logits:
        import torch

        shared = self._shared
        if len(input_ids) == 1:
            numbers = np.array([[*input_ids, self._next_position, self._length]], np.int64)
            rows = {"input_ids": numbers[:, :1], "position_ids": numbers[:, 1:2], "write_index": numbers[:, 2]}
            logits: Logits = shared.decode(self._place, rows)[0]
            return logits
        cache = shared.part(self._place, self._length, self._next_position)
        return _numpy(shared.model.decode(torch.tensor([input_ids], device=shared.device), cache)[0, -1])


class TorchEngine(TorchSlot):
    """A single sequence. Importing this module loads no torch; making an engine does.

    On CUDA single ids are decoded by a captured graph. The CUDA part was written without a GPU and never run on one.
    """

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
        by `perf_counter`. Raises MachineError for `cuda` where PyTorch finds none, or too little memory.
        """
        shared = _Shared(
            model,
            capacity=capacity,
            num_slots=1,
            device=device,
            precision=precision,
            compiled=compiled,
            started=started,
        )
        super().__init__(shared, 0)

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
        model, precision = _open(bundle, manifest, checkpoint, device)
        return cls(
            model,
            capacity=manifest.contract.capacity,
            device=device,
            precision=precision,
            compiled=compiled,
            started=start,
        )

    @property
    def decode_mode(self) -> str:
        """How single ids are decoded, as `DecodeStep` says it."""
        return self._shared.steps[1].mode

    @property
    def code(self) -> str:
        """Of that step."""
        return self._shared.steps[1].code

    def close(self) -> None:
        super().close()
        self._shared.close()


class TorchPool(SlotPool[TorchSlot]):
    """Several sequences of one model, each with a cache of its own.

    On CUDA a step runs over the first slots, as many as there is a captured graph for; that was never run on a GPU.
    """

    def __init__(
        self,
        model: SkipVisionModel,
        *,
        capacity: int,
        num_slots: int,
        device: Device = "cpu",
        precision: TorchPrecision = "fp32",
        compiled: bool = False,
        started: float | None = None,
    ) -> None:
        """Allocates all caches; else as `TorchEngine`."""
        self._shared = shared = _Shared(
            model,
            capacity=capacity,
            num_slots=num_slots,
            device=device,
            precision=precision,
            compiled=compiled,
            started=started,
        )
        recorded = shared.steps if device == "cuda" or compiled else ()
        super().__init__((TorchSlot(shared, number) for number in range(num_slots)), tuple(recorded))

    @classmethod
    def of_bundle(cls, bundle: Path, manifest: Manifest, *, device: Device = "cpu", num_slots: int) -> TorchPool:
        """As `TorchEngine.of_bundle`."""
        start = perf_counter()
        model, precision = _open(bundle, manifest, None, device)
        capacity = manifest.contract.capacity
        return cls(model, capacity=capacity, num_slots=num_slots, device=device, precision=precision, started=start)

    @property
    def decode_modes(self) -> dict[int, str]:
        """How a step over so many slots, from the first on, is decoded, as `DecodeStep` says it."""
        return {size: step.mode for size, step in self._shared.steps.items()}

    def close(self) -> None:
        super().close()
        self._shared.close()

    def _decode(self, run: range, rows: Mapping[str, Ints]) -> npt.NDArray[np.float32]:
        return self._shared.decode(run, rows)


def _open(
    bundle: Path, manifest: Manifest, checkpoint: Path | None, device: Device
) -> tuple[SkipVisionModel, TorchPrecision]:
    """The model, and what to compute in."""
    from svcli_export.restore import original_model, restore_model

    model = restore_model(bundle, manifest) if checkpoint is None else original_model(checkpoint, manifest)
    return model, "fp16" if device == "cuda" and manifest.contract.compute_dtype == "float16" else "fp32"


def _numpy(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    """In fp32, since numpy has no bf16; exact for the other way round as well."""
    return np.asarray(tensor.float().cpu().numpy(), np.float32)
