"""How the kernels are launched: parameters in order, dimensions, constants. Imports nothing of CUDA or TensorRT.

TensorRT's registration, the check on a GPU and the tests on the CPU all read it here. A size is an int, or one of
TensorRT's symbolic expressions: those of a plan are evaluated at run time, for the shapes of the call.

SummaryPool is two kernels: SummaryPartial pools parts of a group of rows, SummaryMerge joins them.

Shapes: B batch or images, H heads, N rows, M rows taken, D elements of a row, S parts of a group.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Element = Literal["fp32", "fp16", "bf16"]
"""dtype of rows, weights and results."""
Op = Literal["TokenGather", "SummaryPartial", "SummaryMerge"]
Size = Any
"""An int, or a symbolic expression that knows `*`."""

OPS: tuple[Op, ...] = get_args(Op)
ELEMENTS: tuple[Element, ...] = get_args(Element)
ELEMENT_BYTES: Mapping[Element, int] = {"fp32": 4, "fp16": 2, "bf16": 2}

_ACCESS_BYTES = 16
_GATHER_THREADS = 256
_GATHER_UNROLL = 4
_PARTIAL_THREADS = 256
PARTIAL_ROWS = 8
"""Rows of a part: one for each warp of a block, so that rows are scored without barriers."""
MAX_POOL_WIDTH = 8192
"""Widest row that is pooled: what the warps of a row hold in registers."""
STATE_EXTRAS = 2
"""What a part's state has beside its weighted sums: its greatest score and its sum of weights."""
_MERGE_THREADS = 256
_MERGE_UNROLL = 4
_MERGE_COLUMNS = 32
"""Columns of a block: one for each lane."""


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
    "SummaryPartial": Kernel(
        "summary_partial",
        ("tokens", "norm_weight", "norm_bias", "score_weight", "score_bias"),
        ("num_images", "num_rows", "num_parts", "width", "epsilon_bits"),
        "partial",
    ),
    "SummaryMerge": Kernel(
        "summary_merge", ("partial", "norm_weight"), ("num_images", "num_parts", "width"), "summary"
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


def defines(op: Op, element: Element) -> dict[str, int]:
    """What kernels.cu has to know when it is compiled."""
    selected = {f"SVCLI_{KERNELS[op].name.upper()}": 1, f"SVCLI_{element.upper()}": 1}
    match op:
        case "TokenGather":
            return selected | {"SVCLI_GATHER_THREADS": _GATHER_THREADS, "SVCLI_GATHER_UNROLL": _GATHER_UNROLL}
        case "SummaryPartial":
            rows = {"SVCLI_PARTIAL_ROWS": PARTIAL_ROWS, "SVCLI_PARTIAL_MAX_WIDTH": MAX_POOL_WIDTH}
            return selected | {"SVCLI_PARTIAL_THREADS": _PARTIAL_THREADS} | rows
        case "SummaryMerge":
            return selected | {"SVCLI_MERGE_THREADS": _MERGE_THREADS, "SVCLI_MERGE_UNROLL": _MERGE_UNROLL}


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


def num_parts(num_rows: Size, arithmetic: Arithmetic = INTEGERS) -> Size:
    """S for a group of N rows. A group of none has one part, which is empty, so that no tensor is."""
    return arithmetic.maximum(arithmetic.ceil_div(num_rows, PARTIAL_ROWS), 1)


def summary_partial(
    tokens: Sequence[Size], element: Element, epsilon: float, arithmetic: Arithmetic = INTEGERS
) -> Launch:
    """States [B, S, D + 2], fp32, of the parts of `tokens` [B, N, D], a shape whose D is known.

    Raises LaunchError for other ranks, and for rows that are empty or wider than MAX_POOL_WIDTH.
    """
    if len(tokens) != 3:
        raise LaunchError(f"SummaryPool takes tokens [B, N, D], not {len(tokens)} axes")
    num_images, num_rows, width = tokens
    parts = num_parts(num_rows, arithmetic)
    # An extra argument is an integer, so that a float travels as its bits.
    (epsilon_bits,) = struct.unpack("i", struct.pack("f", epsilon))
    extras = (num_images, num_rows, parts, _checked(width), epsilon_bits)
    grid = arithmetic.maximum(num_images, 1) * parts
    return Launch(entry_name("SummaryPartial", element), grid, _PARTIAL_THREADS, extras)


def summary_merge(
    partial: Sequence[Size], norm_weight: Sequence[int], element: Element, arithmetic: Arithmetic = INTEGERS
) -> Launch:
    """Summaries [B, 1, D] of `partial` [B, S, D + 2], which SummaryPartial made; `norm_weight` is [D]. Both are shapes.

    Raises LaunchError for other ranks, and for rows that are empty or wider than MAX_POOL_WIDTH.
    """
    if len(partial) != 3 or len(norm_weight) != 1:
        raise LaunchError(
            "SummaryMerge takes partial [B, S, D + 2] and norm_weight [D],"
            f" not {len(partial)} and {len(norm_weight)} axes"
        )
    num_images, parts, _ = partial
    width = _checked(norm_weight[0])
    grid = arithmetic.maximum(num_images, 1) * INTEGERS.ceil_div(width, _MERGE_COLUMNS)
    return Launch(entry_name("SummaryMerge", element), grid, _MERGE_THREADS, (num_images, parts, width))


def _checked(width: int) -> int:
    if not 1 <= width <= MAX_POOL_WIDTH:
        raise LaunchError(f"SummaryPool takes rows of 1 to {MAX_POOL_WIDTH} elements, not {width}")
    return width


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
