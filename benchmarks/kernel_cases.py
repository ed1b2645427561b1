"""What the plugins' kernels are asked, and what they promise: cases, their inputs, and references in PyTorch.

The check on a GPU and the tests on the CPU read it here. Imports torch, NumPy and nothing of ONNX or TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from svcli_engines.plugins.launch import (
    ELEMENTS,
    STATE_EXTRAS,
    Element,
    Launch,
    num_parts,
    summary_merge,
    summary_partial,
    token_gather,
)
from svcli_export import ops

EPSILON = 1e-5
DTYPES: dict[Element, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GatherValues = Literal["normal", "bits"]
"""`bits` are drawn alike, so that there are infinities, subnormal numbers and many a NaN."""
PoolValues = Literal["normal", "subnormal", "special", "patterns"]
"""`special` has a NaN in the first image and an infinity in the second.

`patterns` are rows of all numbers of 16 bits up to 1e30, each row its own summary.
"""
_HALF_ULP: dict[Element, float] = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
_SMALLEST: dict[Element, float] = {"fp32": 2.0**-149, "fp16": 2.0**-24, "bf16": 2.0**-133}
_POISON = 0xFF
_AT_ONCE = 2**27
"""Elements that a reference in fp64 is computed of at once."""


class Device(Protocol):
    """Something that runs the kernels."""

    def launch(self, launch: Launch, element: Element, inputs: Sequence[Tensor], output: Tensor) -> None:
        """Starts one kernel."""


@dataclass(frozen=True)
class Gather:
    """TokenGather of `num_taken` rows of `data`, a shape, `shift` elements behind an aligned address."""

    element: Element
    data: tuple[int, ...]
    num_taken: int
    values: GatherValues = "normal"
    shift: int = 0

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        *groups, _, width = self.data
        rows = self.num_taken * torch.Size(groups).numel()
        return 2 * rows * width * DTYPES[self.element].itemsize + 8 * self.data[0] * self.num_taken


@dataclass(frozen=True)
class Pool:
    """SummaryPool of `tokens`, a shape, `shift` elements behind an aligned address."""

    element: Element
    tokens: tuple[int, int, int]
    values: PoolValues = "normal"
    shift: int = 0

    @property
    def moved(self) -> int:
        """Bytes read and written, but for the states between the two kernels."""
        images, rows, width = self.tokens
        return (images * (rows + 1) + 2) * width * DTYPES[self.element].itemsize

    @property
    def partial(self) -> tuple[int, int, int]:
        """Shape of those states."""
        images, rows, width = self.tokens
        return images, num_parts(rows), width + STATE_EXTRAS


Case = Gather | Pool


@dataclass(frozen=True)
class Fault:
    """How an answer differs from what is promised."""

    wrong: int
    """Elements."""
    first: tuple[int, ...]
    """Index of the first of them."""
    greatest: float
    """Error; infinite where one of the two is no number."""

    def __str__(self) -> str:
        return f"{self.wrong} elements are wrong, the first at {list(self.first)}, by up to {self.greatest:.3g}"


def gathered(data: Tensor, index: Tensor) -> Tensor:
    """What TokenGather promises: the eager op, heads by the same index, zeros for rows that there are not."""
    num_rows = data.shape[-2]
    wrapped = torch.where(index < 0, index + num_rows, index)
    inside = (wrapped >= 0) & (wrapped < num_rows)
    shape = (*data.shape[:-2], index.shape[1], data.shape[-1])
    if not data.numel():
        return data.new_zeros(shape)
    heads = data.shape[1] if data.dim() == 4 else 1
    picked = torch.where(inside, wrapped, 0).repeat_interleave(heads, 0)
    rows = ops.token_gather(data.reshape(-1, num_rows, data.shape[-1]), picked)
    return torch.where(inside.repeat_interleave(heads, 0)[..., None], rows, 0).reshape(shape)


def pooled(inputs: Sequence[Tensor], element: Element, epsilon: float = EPSILON) -> tuple[Tensor, Tensor]:
    """What SummaryPool promises, the eager op in fp64, and how far off arithmetic in fp32 may be.

    A score is a sum whose terms may cancel, so that its error grows with the sum of their magnitudes; the error of a
    weight is that of its score, and the result is a mean of rows. To that comes the rounding of the result, and of each
    addition where numbers are subnormal.
    """
    tokens, norm_weight, _, score_weight, _ = exact = [each.double() for each in inputs]
    expected = ops.summary_pool(*exact, epsilon=epsilon)
    num_rows = tokens.shape[1]
    if not tokens.numel():
        return expected, torch.zeros_like(expected)
    deviation = (tokens.var(-1, correction=0) + epsilon).sqrt()
    terms = (tokens.abs() + tokens.mean(-1, keepdim=True).abs()) * (norm_weight * score_weight[0]).abs()
    magnitude = (terms.sum(-1) / deviation).amax(1)[:, None, None]
    reach = tokens.abs().amax((1, 2), keepdim=True)
    rounding = _HALF_ULP[element] * expected.abs() + _SMALLEST[element] / 2 + 4 * num_rows * _SMALLEST["fp32"]
    return expected, rounding + 2.0**-22 * (8 + magnitude) * reach


def gather_inputs(case: Gather, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random rows, and an index with rows that come twice, from the end, and not at all; made where `generator` is."""
    num_rows = case.data[-2]
    shape = (case.data[0], case.num_taken)
    index = torch.randint(-num_rows - 1, num_rows + 1, shape, generator=generator, device=generator.device)
    dtype = DTYPES[case.element]
    if case.values == "normal":
        return _normal(case.data, case.element, generator, case.shift), index
    # A word of 16 bits at a time: torch draws no number below 2**32 for an int32.
    words = (*case.data[:-1], case.data[-1] * dtype.itemsize // 2)
    drawn = torch.randint(-(2**15), 2**15, words, generator=generator, device=generator.device, dtype=torch.int16)
    return shifted(drawn.view(dtype), case.shift), index


def pool_inputs(case: Pool, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random tokens whose means differ from zero, and weights that make scores differ; made where `generator` is."""
    width, element = case.tokens[2], case.element
    if case.values == "patterns":
        tokens = finite_patterns(element, case.tokens, generator.device)
        shapes = ((width,), (width,), (1, width), (1,))
        return tokens, *(torch.zeros(*shape, dtype=tokens.dtype, device=tokens.device) for shape in shapes)
    tokens = _normal(case.tokens, element, generator) + _normal((*case.tokens[:2], 1), element, generator)
    if case.values == "subnormal":
        tokens *= 64 * _SMALLEST[element]
    if case.values == "special":
        tokens[0, -1, width // 2] = float("nan")
        tokens[1, 0, 0] = float("inf")
    weights = [_normal((width,), element, generator) for _ in range(2)]
    scores = [_normal((1, width), element, generator) * 4 * width**-0.5, _normal((1,), element, generator)]
    return tuple(shifted(each, case.shift) for each in (tokens, *weights, *scores))


def finite_patterns(element: Element, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """All numbers of a type of 16 bits up to 1e30, as far as `shape` holds them, and zeros behind them.

    Beyond it the sum of a row is infinite in fp32.
    """
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(DTYPES[element])
    finite = patterns[patterns.isfinite() & (patterns.abs() < 1e30)]
    tokens = torch.zeros(torch.Size(shape).numel(), dtype=finite.dtype)
    tokens[: len(finite)] = finite[: len(tokens)]
    return tokens.view(shape).to(device)


def _normal(shape: Sequence[int], element: Element, generator: torch.Generator, shift: int = 0) -> Tensor:
    # Where it is used and in its own type: billions of numbers from the CPU would take longer than all else.
    made = torch.empty(torch.Size(shape).numel() + shift, dtype=DTYPES[element], device=generator.device)
    return made[shift:].normal_(generator=generator).view(*shape)


def shifted(values: Tensor, shift: int) -> Tensor:
    """A copy that many elements behind an aligned address; `values` themselves where that is none."""
    if not shift:
        return values
    memory = torch.empty(values.numel() + shift, dtype=values.dtype, device=values.device)[shift:].view(values.shape)
    return memory.copy_(values)


def poisoned(shape: Sequence[int], element: Element, where: str | torch.device, shift: int = 0) -> Tensor:
    """NaN in every element, so that one which is not written is found."""
    size = (torch.Size(shape).numel() + shift) * DTYPES[element].itemsize
    memory = torch.full((size,), _POISON, dtype=torch.uint8, device=where).view(DTYPES[element])
    return memory[shift:].view(*shape)


def launch_gather(device: Device, case: Gather, inputs: Sequence[Tensor], output: Tensor) -> None:
    """Starts it."""
    launch = token_gather(case.data, tuple(inputs[1].shape), case.element)
    device.launch(launch, case.element, inputs, output)


def launch_pool(device: Device, case: Pool, inputs: Sequence[Tensor], partial: Tensor, output: Tensor) -> None:
    """Starts both kernels, with `partial` between them."""
    device.launch(summary_partial(case.tokens, case.element, EPSILON), case.element, inputs, partial)
    merge = summary_merge(case.partial, inputs[1].shape, case.element)
    device.launch(merge, case.element, (partial, inputs[1]), output)


def fault(device: Device, case: Case, generator: torch.Generator, repeats: int) -> Fault | None:
    """What is wrong with the answer to `case`, or None; a pool has to give the same bits `repeats` times.

    Inputs are made where `generator` is, which is where the kernels run.
    """
    if isinstance(case, Gather):
        return _gather_fault(device, case, generator)
    return _pool_fault(device, case, generator, repeats)


def _gather_fault(device: Device, case: Gather, generator: torch.Generator) -> Fault | None:
    inputs = gather_inputs(case, generator)
    expected = gathered(*inputs)
    output = poisoned(expected.shape, case.element, generator.device, case.shift)
    launch_gather(device, case, inputs, output)
    # Comparing waits for the kernel, which runs on the same stream.
    return _found(output, expected, _bits(output) != _bits(expected))


def _pool_fault(device: Device, case: Pool, generator: torch.Generator, repeats: int) -> Fault | None:
    inputs = pool_inputs(case, generator)
    expected, tolerance = _pooled_in_turn(inputs, case)
    answers: list[Tensor] = []
    for _ in range(repeats):
        partial = poisoned(case.partial, "fp32", generator.device)
        output = poisoned(expected.shape, case.element, generator.device, case.shift)
        launch_pool(device, case, inputs, partial, output)
        answers = [*answers[:1], output]
        if found := _found(output, answers[0], _bits(output) != _bits(answers[0])):
            return found
    first = answers[0]
    right = ((first.double() - expected).abs() <= tolerance) | (first.isnan() & expected.isnan())
    return _found(first, expected, ~right)


def _pooled_in_turn(inputs: Sequence[Tensor], case: Pool) -> tuple[Tensor, Tensor]:
    """`pooled`, a few images at a time, so that the reference fits beside what it is a reference for."""
    tokens, *weights = inputs
    if case.values == "patterns":
        return tokens.double(), torch.zeros_like(tokens, dtype=torch.float64)
    step = max(1, _AT_ONCE // max(1, tokens[:1].numel()))
    pairs = [pooled([part, *weights], case.element) for part in torch.split(tokens, step)]
    expected, tolerance = zip(*pairs, strict=True)
    return torch.cat(expected), torch.cat(tolerance)


def _bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32}[values.dtype.itemsize])


def _found(output: Tensor, expected: Tensor, bad: Tensor) -> Fault | None:
    if not bad.any():
        return None
    errors = (output[bad].double() - expected[bad].double()).abs().nan_to_num(nan=float("inf"))
    return Fault(int(bad.sum()), tuple(bad.nonzero()[0].tolist()), float(errors.max()))


def check_cases() -> Iterator[Case]:
    """Shapes that take every path of the kernels: whole, partial and single accesses, every team, no rows at all; then
    addresses off 16 bytes, and numbers that are none, infinite or subnormal."""
    widths = (1, 3, 4, 8, 62, 64, 257, 1024, 1032, 3584, 4095, 4096, 4104, 8192)
    for element, width in product(ELEMENTS, widths):
        yield Gather(element, (2, 37, width), 53)
        yield Gather(element, (2, 3, 11, width), 7)
        yield Pool(element, (3, 97, width))
    for element in ELEMENTS:
        yield Gather(element, (1, 2880, 4096), 576)
        yield Gather(element, (1, 5, 64), 0)
        yield Gather(element, (1, 0, 64), 3)
        for rows in (0, 1, 8, 9, 576, 2880):
            yield Pool(element, (2, rows, 1024))
        for shift in (1, 2, 4):
            yield Gather(element, (2, 37, 1024), 53, shift=shift)
            yield Pool(element, (2, 37, 1024), shift=shift)
        yield Gather(element, (2, 37, 4096), 53, "bits")
        yield Pool(element, (3, 97, 1024), "special")
        yield Pool(element, (3, 97, 1024), "subnormal")
    for element in ("fp16", "bf16"):
        yield Pool(element, (16, 1, 4096), "patterns")


def few_cases() -> Iterator[Case]:
    """Each path once, small enough for a checker that watches every access."""
    for element in ELEMENTS:
        yield Gather(element, (2, 5, 64), 7)
        yield Gather(element, (2, 3, 5, 9), 7, shift=1)
        for width in (9, 64, 2048, 8192):
            yield Pool(element, (2, 11, width))
        yield Pool(element, (1, 0, 64))


def large_cases() -> Iterator[tuple[Case, int]]:
    """More elements than 32 bits count, read or written, and the bytes that each needs with its reference."""
    rows = 2**31 // 4096 + 64
    yield Gather("bf16", (1, rows, 4096), 64), 2**34
    yield Gather("bf16", (1, 64, 4096), rows), 2**35
    yield Pool("bf16", (rows // 8192 + 1, 8192, 4096)), 2**35


def bandwidth_cases() -> Iterator[Case]:
    """Shapes of a 7B model: visual tokens and caches, one picture and many."""
    for images in (1, 32):
        for rows, taken in ((576, 144), (2880, 576)):
            yield Gather("bf16", (images, rows, 4096), taken)
            yield Gather("bf16", (images, 8, rows, 128), taken)
            yield Pool("bf16", (images, rows, 4096))


def described(case: Case) -> dict[str, Any]:
    """A case as it is written down."""
    same = {"dtype": case.element, "values": case.values, "shift": case.shift}
    if isinstance(case, Gather):
        return {"op": "TokenGather", "data": list(case.data), "taken": case.num_taken} | same
    return {"op": "SummaryPool", "tokens": list(case.tokens)} | same
