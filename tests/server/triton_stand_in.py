"""Stands in for `triton_python_backend_utils`, as Triton's Python backend documents it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
SECONDS = 30.0


class TritonModelException(Exception):
    """What ends the loading of a model."""


class TritonError:
    """What a response has instead of outputs."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = UNKNOWN) -> None:
        self.message, self.code = message, code


class Tensor:
    """A name and an array."""

    def __init__(self, name: str, array: npt.NDArray[Any]) -> None:
        assert array.dtype != np.dtype("U")
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> npt.NDArray[Any]:
        return self._array


@dataclass
class InferenceResponse:
    """Outputs, or an error."""

    output_tensors: Sequence[Tensor] = ()
    error: TritonError | None = None

    @property
    def refusal(self) -> TritonError:
        """The error that there must be."""
        assert self.error is not None
        return self.error

    @property
    def outputs(self) -> dict[str, Any]:
        return {each.name(): each.as_numpy()[0] for each in self.output_tensors}


class Sender:
    """Takes responses until the last, and none behind it."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.cancelled = False
        self._final = threading.Event()

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        assert not self._final.is_set(), "a response behind the last"
        self.responses.append(response)
        if flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self._final.set()

    def is_cancelled(self) -> bool:
        return self.cancelled

    def all(self) -> list[InferenceResponse]:
        """When the last is there."""
        assert self._final.wait(SECONDS), self.responses
        return self.responses


class Request:
    """A request with some of the inputs."""

    def __init__(self, inputs: Mapping[str, npt.NDArray[Any]], timeout: int = 0) -> None:
        self.inputs, self.sender, self._timeout = inputs, Sender(), timeout

    def get_response_sender(self) -> Sender:
        return self.sender

    def timeout(self) -> int:
        """Microseconds; 0: none."""
        return self._timeout


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return Tensor(name, request.inputs[name]) if name in request.inputs else None


@dataclass
class Metric:
    """A number under a name."""

    value: float = 0.0

    def set(self, value: float) -> None:
        self.value = value

    def increment(self, value: float) -> None:
        assert value >= 0
        self.value += value


@dataclass
class MetricFamily:
    """Metrics of one name."""

    COUNTER: ClassVar[str] = "counter"
    GAUGE: ClassVar[str] = "gauge"
    known: ClassVar[dict[str, Metric]] = {}

    name: str
    description: str
    kind: str
    labels: Mapping[str, str] = field(default_factory=dict)

    def Metric(self, labels: Mapping[str, str]) -> Metric:
        assert labels.keys() == {"model", "version"}
        return self.known.setdefault(self.name, Metric())


class Logger:
    """Where errors go."""

    errors: ClassVar[list[str]] = []

    @classmethod
    def log_error(cls, text: str) -> None:
        cls.errors.append(text)
