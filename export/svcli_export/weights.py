"""One safetensors file as the external data of all three graphs.

ONNX external data is a file, an offset and a length, and so is a tensor in safetensors: the graphs point into it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from onnx import TensorProto
from safetensors.numpy import save_file

WEIGHTS_FILE = "weights.safetensors"
_ONNX_TYPES = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "I8": TensorProto.INT8}


class WeightFile:
    """Names of a written safetensors file, and each as an ONNX initializer that refers to it."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            self._header: dict[str, Any] = json.loads(file.read(length))
        self._header.pop("__metadata__", None)
        self._start = 8 + length

    @staticmethod
    def write(tensors: Mapping[str, npt.NDArray[Any]], path: Path) -> WeightFile:
        save_file(dict(tensors), path)
        path.chmod(0o644)  # it is written for its owner only; a bundle is for everybody
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
        tensor = TensorProto(
            name=name,
            data_type=_ONNX_TYPES[entry["dtype"]],
            dims=entry["shape"],
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", WEIGHTS_FILE), ("offset", self._start + begin), ("length", end - begin)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor
