"""One safetensors file as the external data of all three graphs, written tensor by tensor.

ONNX external data is a file, an offset and a length, and so is a tensor in safetensors: the graphs point into it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

WEIGHTS_FILE = "weights.safetensors"
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8)}
"""Widest first, which is the order of the file, so that every tensor is aligned."""
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANKS = {name: rank for rank, name in enumerate(_DTYPES)}
_ONNX_TYPES = {
    "F32": TensorProto.FLOAT,
    "F16": TensorProto.FLOAT16,
    "I8": TensorProto.INT8,
    "U8": TensorProto.UINT4,  # safetensors has no 4 bit type: two in a byte, the first one low, as ONNX packs them
}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor will be, before there is one."""

    dtype: npt.DTypeLike
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together, once they are to be written: a matrix, its scales, its zero points."""

    infos: Mapping[str, TensorInfo]
    make: Callable[[], Mapping[str, npt.NDArray[Any]]]


def write_safetensors(pieces: Sequence[Piece], path: Path) -> None:
    """Writes the tensors of all `pieces`, one piece in memory at a time; `path` is whole or not there.

    Byte for byte what the safetensors package writes, which wants all tensors at once.
    """
    infos = {name: info for piece in pieces for name, info in piece.infos.items()}
    assert len(infos) == sum(len(piece.infos) for piece in pieces), "a name was given twice"
    kinds = {name: _NAMES[np.dtype(info.dtype)] for name, info in infos.items()}
    header, offsets, end = {}, {}, 0
    for name in sorted(infos, key=lambda name: (_RANKS[kinds[name]], name)):
        offsets[name], end = end, end + infos[name].size
        header[name] = {"dtype": kinds[name], "shape": list(infos[name].shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    fresh = path.with_name(f".{path.name}.partial")
    try:
        with fresh.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            start = file.tell()
            file.truncate(start + end)
            for piece in pieces:
                _write(file.fileno(), start, piece, offsets)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _write(file: int, start: int, piece: Piece, offsets: Mapping[str, int]) -> None:
    made = piece.make()
    assert made.keys() == piece.infos.keys()
    for name, tensor in made.items():
        info = piece.infos[name]
        assert (tensor.dtype, tensor.shape) == (info.dtype, info.shape), f"{name}: {tensor.dtype} {tensor.shape}"
        left, offset = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data, start + offsets[name]
        while left:  # one call writes 2 GiB at most
            done = os.pwrite(file, left, offset)
            left, offset = left[done:], offset + done


class WeightFile:
    """Names of a written safetensors file, and each as an ONNX initializer that refers to it."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            self._header: dict[str, Any] = json.loads(file.read(length))
        self._header.pop("__metadata__", None)
        self._start = 8 + length

    @staticmethod
    def write(pieces: Iterable[Piece], path: Path) -> WeightFile:
        write_safetensors(list(pieces), path)
        return WeightFile(path)

    def __contains__(self, name: str) -> bool:
        return name in self._header

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._header)

    def initializer(self, stored: str, name: str) -> TensorProto:
        """The tensor `stored` as an initializer `name`. Raises KeyError for one that is not in the file."""
        entry = self._header[stored]
        begin, end = entry["data_offsets"]
        *outer, last = entry["shape"]
        tensor = TensorProto(
            name=name,
            data_type=_ONNX_TYPES[entry["dtype"]],
            dims=[*outer, 2 * last] if entry["dtype"] == "U8" else entry["shape"],
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", WEIGHTS_FILE), ("offset", self._start + begin), ("length", end - begin)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor
