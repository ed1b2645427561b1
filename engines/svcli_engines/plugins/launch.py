"""How the kernels are launched: parameters in order, dimensions, constants. Imports nothing of CUDA or TensorRT.

TensorRT's registration, the check on a GPU and the tests on the CPU all read it here. A size is an int, or one of
TensorRT's symbolic expressions: those of a plan are evaluated at run time, for the shapes of the call.

Shapes: B batch or images, H heads, N rows, M rows taken, D elements of a row.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Element = Literal["fp32", "fp16", "bf16"]
"""dtype of rows, weights and results."""
Op = Literal["TokenGather", "SummaryPool"]
Size = Any
"""An int, or a symbolic expression that knows `*`."""

OPS: tuple[Op, ...] = get_args(Op)
ELEMENTS: tuple[Element, ...] = get_args(Element)
ELEMENT_BYTES: Mapping[Element, int] = {"fp32": 4, "fp16": 2, "bf16": 2}

_ACCESS_BYTES = 16
_GATHER_THREADS = 256
_GATHER_UNROLL = 4
_POOL_THREADS = 512
_POOL_PER_THREAD = 16
MAX_POOL_WIDTH = _POOL_THREADS * _POOL_PER_THREAD
"""Widest row that SummaryPool takes: it is held in the registers of one block."""
_CLUSTER = 8
"""Blocks that share an image where the hardware has clusters: the most that every such GPU offers."""


class LaunchError(ValueError):
    """Shapes or types that the kernels do not take; the message says which they take."""


@dataclass(frozen=True)
class Kernel:
    """Parameters of a kernel by name, in TensorRT's order: inputs, extra arguments (32 bit integers), output."""

    name: str
    inputs: tuple[str, ...]
    extras: tuple[str, ...]
    output: str

    @property
    def parameters(self) -> tuple[str, ...]:
        return *self.inputs, *self.extras, self.output


KERNELS: Mapping[Op, Kernel] = {
    "TokenGather": Kernel(
        "token_gather", ("data", "index"), ("groups", "heads", "num_rows", "num_taken", "width"), "rows"
    ),
    "SummaryPool": Kernel(
        "summary_pool",
        ("tokens", "norm_weight", "norm_bias", "score_weight", "score_bias"),
        ("num_images", "num_rows", "width", "epsilon_bits"),
        "summary",
    ),
}


@dataclass(frozen=True)
class Arithmetic:
    """What sizes need beyond `*`: of ints here, of symbolic expressions in registration.py."""

    ceil_div: Callable[[Size, int], Size]
    maximum: Callable[[Size, int], Size]


INTEGERS = Arithmetic(lambda dividend, divisor: -(-dividend // divisor), max)


@dataclass(frozen=True)
class Launch:
    """One launch: a grid of `grid` blocks of `block` threads, without dynamic shared memory."""

    entry: str
    grid: Size
    block: int
    extras: tuple[Size, ...]


def entry_name(op: Op, element: Element) -> str:
    """Name of the kernel in the compiled module."""
    return f"{KERNELS[op].name}_{element}"


def pool_blocks(target: str) -> int:
    """Blocks that share one image on `target`, such as `sm_90`, the first that has clusters."""
    return _CLUSTER if int(target.removeprefix("sm_")) >= 90 else 1


def defines(op: Op, element: Element, num_blocks: int) -> dict[str, int]:
    """Constants that kernels.cu is compiled with; `num_blocks` as from `pool_blocks`."""
    return {
        f"SVCLI_{KERNELS[op].name.upper()}": 1,
        f"SVCLI_{element.upper()}": 1,
        "SVCLI_GATHER_THREADS": _GATHER_THREADS,
        "SVCLI_GATHER_UNROLL": _GATHER_UNROLL,
        "SVCLI_POOL_THREADS": _POOL_THREADS,
        "SVCLI_POOL_PER_THREAD": _POOL_PER_THREAD,
        "SVCLI_POOL_BLOCKS": num_blocks,
    }


def token_gather(
    data: Sequence[Size], index: Sequence[Size], element: Element, arithmetic: Arithmetic = INTEGERS
) -> Launch:
    """Rows [B, M, D] of `data` [B, N, D], or [B, H, M, D] of [B, H, N, D], by `index` [B, M]: both are shapes.

    Raises LaunchError for other ranks.
    """
    if len(data) not in (3, 4) or len(index) != 2:
        raise LaunchError(
            f"TokenGather takes data [B, N, D] or [B, H, N, D] and index [B, M], not {len(data)} and {len(index)} axes"
        )
    batch, *heads, num_rows, width = data
    groups = batch * heads[0] if heads else batch
    num_taken = index[1]
    accesses = groups * num_taken * arithmetic.ceil_div(width * ELEMENT_BYTES[element], _ACCESS_BYTES)
    # Where nothing is taken one block finds nothing to do, because a grid of none is an error.
    grid = arithmetic.maximum(arithmetic.ceil_div(accesses, _GATHER_THREADS * _GATHER_UNROLL), 1)
    extras = (groups, heads[0] if heads else 1, num_rows, num_taken, width)
    return Launch(entry_name("TokenGather", element), grid, _GATHER_THREADS, extras)


def summary_pool(
    tokens: Sequence[Size], element: Element, epsilon: float, num_blocks: int, arithmetic: Arithmetic = INTEGERS
) -> Launch:
    """Summaries [B, 1, D] of `tokens` [B, N, D], a shape; `num_blocks` as the module was compiled for.

    Raises LaunchError for other ranks, and for rows that are known to be wider than MAX_POOL_WIDTH.
    """
    if len(tokens) != 3:
        raise LaunchError(f"SummaryPool takes tokens [B, N, D], not {len(tokens)} axes")
    num_images, num_rows, width = tokens
    if isinstance(width, int) and width > MAX_POOL_WIDTH:
        raise LaunchError(f"SummaryPool takes rows of up to {MAX_POOL_WIDTH} elements, not {width}")
    # An extra argument is an integer, so that a float travels as its bits.
    (epsilon_bits,) = struct.unpack("i", struct.pack("f", epsilon))
    grid = arithmetic.maximum(num_images, 1) * num_blocks
    return Launch(entry_name("SummaryPool", element), grid, _POOL_THREADS, (num_images, num_rows, width, epsilon_bits))


class PackedParameters:
    """A launch's parameters as cuLaunchKernel takes them: the address of an array of their addresses."""

    def __init__(self, launch: Launch, inputs: Sequence[int], output: int) -> None:
        """`inputs` and `output` are addresses, as a kernel reads them; the extra arguments of `launch` are ints."""
        extras = [ctypes.c_int32(extra) for extra in launch.extras]
        self._values = [*map(ctypes.c_void_p, inputs), *extras, ctypes.c_void_p(output)]
        self._addresses = (ctypes.c_void_p * len(self._values))(*map(ctypes.addressof, self._values))

    @property
    def address(self) -> int:
        """Good for as long as this object lives."""
        return ctypes.addressof(self._addresses)
