"""A checkpoint in PyTorch behind the engine protocol: the reference that the others are held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from skipvision.cost import kv_bytes
from skipvision.layout import BatchLayout, TokenLayout
from svcli_engines.base import Logits, Pixels, Visual, check_extend, check_prefill

if TYPE_CHECKING:
    from skipvision.decoder import KVCache


class TorchEngine:
    """fp32 on the CPU. Importing this module loads no torch; making an engine does."""

    def __init__(self, checkpoint: Path, *, capacity: int) -> None:
        """`capacity`: rows of the KV cache. Raises CheckpointError for an unusable checkpoint."""
        start = perf_counter()
        from skipvision.checkpoint import load_checkpoint

        self.name = "torch-cpu"
        self.precision = "fp32"
        self._capacity = capacity
        self._model = load_checkpoint(checkpoint)
        self._cache: KVCache | None = None
        self.load_seconds = perf_counter() - start

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def kv_bytes_per_row(self) -> int:
        return kv_bytes(self._model.config.text, 1, bytes_per_element=4)

    @property
    def length(self) -> int:
        return 0 if self._cache is None else int(self._cache.lengths[0])

    def encode(self, pixels: Pixels) -> Visual:
        import torch

        with torch.no_grad():
            return self._model.encode_images(torch.from_numpy(pixels)).numpy()

    def prefill(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        import torch

        check_prefill(layout, visual, self._capacity)
        width = self._model.config.text.hidden_size
        rows = torch.from_numpy(np.zeros((0, 1, width), np.float32) if visual is None else visual)
        batch = BatchLayout.of([layout], len(input_ids))
        logits, self._cache = self._model.prefill(torch.tensor([input_ids]), rows, batch, self._capacity)
        return np.asarray(logits[0].numpy(), np.float32)

    def extend(self, input_ids: Sequence[int]) -> Logits:
        import torch

        check_extend(len(input_ids), self.length, self._capacity)
        assert self._cache is not None  # check_extend saw rows in it
        logits = self._model.decode(torch.tensor([input_ids]), self._cache)
        return np.asarray(logits[0, -1].numpy(), np.float32)

    def reset(self) -> None:
        self._cache = None

    def close(self) -> None:
        self.reset()
