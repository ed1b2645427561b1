"""The plugins' kernels on a CUDA device: right answers, and their bandwidth beside a copy of as many bytes.

    python -m benchmarks.gpu_check [--rounds N]

Needs torch with CUDA, cuda-bindings and a CUDA compiler, and no TensorRT: PTX as it goes into a plan is loaded with the
CUDA driver API and launched with the parameters, in the order and with the dimensions that TensorRT is given. Outputs
are poisoned first. In every round a kernel and a copy that moves as many bytes run in turn.

Exit code 3 where there is no CUDA device, 1 where a kernel answers wrongly; nothing is written then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.measuring import RESULTS, ratio, spread, surroundings, write_results
from svcli_engines.plugins.compile import check_driver, compiled, find_compiler, target_for
from svcli_engines.plugins.launch import (
    ELEMENTS,
    INTEGERS,
    KERNELS,
    OPS,
    Element,
    Launch,
    PackedParameters,
    pool_blocks,
    summary_pool,
    token_gather,
)
from svcli_export import ops

RESULT = RESULTS / "gpu_check.json"
WHERE = "cuda"
NO_DEVICE = 3
EPSILON = 1e-5
DTYPES: dict[Element, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_HALF_ULP: dict[Element, float] = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
_POISON = 0xFF
_WORKING_SET = 2**30
"""Bytes that a measurement goes through, so that no cache holds them."""
_LONGEST_TURN = 256


Timer = Callable[[], float]
"""Seconds that one run took."""


class NoDevice(ValueError):
    """There is nothing to run on; the message says what is missing."""


class Device(Protocol):
    """Something that runs the kernels."""

    def launch(
        self, launch: Launch, element: Element, inputs: Sequence[Tensor], output: Tensor, *, num_blocks: int
    ) -> None:
        """Starts one kernel; `num_blocks` per image is what SummaryPool is compiled for."""


@dataclass(frozen=True)
class Gather:
    """TokenGather of `num_taken` rows of `data`, a shape."""

    element: Element
    data: tuple[int, ...]
    num_taken: int

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        *groups, _, width = self.data
        rows = self.num_taken * torch.Size(groups).numel()
        return 2 * rows * width * DTYPES[self.element].itemsize + 8 * self.data[0] * self.num_taken


@dataclass(frozen=True)
class Pool:
    """SummaryPool of `tokens`, a shape, by `num_blocks` blocks for each image."""

    element: Element
    tokens: tuple[int, int, int]
    num_blocks: int

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        images, rows, width = self.tokens
        return (images * (rows + 1) + 2) * width * DTYPES[self.element].itemsize


def gathered(data: Tensor, index: Tensor) -> Tensor:
    """What TokenGather promises: the eager op, heads by the same index, zeros for rows that there are not."""
    num_rows = data.shape[-2]
    wrapped = torch.where(index < 0, index + num_rows, index)
    inside = (wrapped >= 0) & (wrapped < num_rows)
    shape = (*data.shape[:-2], index.shape[1], data.shape[-1])
    if not num_rows:
        return data.new_zeros(shape)
    heads = data.shape[1] if data.dim() == 4 else 1
    picked = torch.where(inside, wrapped, 0).repeat_interleave(heads, 0)
    rows = ops.token_gather(data.reshape(-1, num_rows, data.shape[-1]), picked)
    return torch.where(inside.repeat_interleave(heads, 0)[..., None], rows, 0).reshape(shape)


def pooled(inputs: Sequence[Tensor], element: Element, epsilon: float = EPSILON) -> tuple[Tensor, Tensor]:
    """What SummaryPool promises, the eager op in fp64, and how far off arithmetic in fp32 may be.

    A score is a sum whose terms may cancel, so that its error grows with the sum of their magnitudes; the error of a
    weight is that of its score, and the result is a mean of rows. To that comes the rounding of the result.
    """
    tokens, norm_weight, _, score_weight, _ = exact = [each.double() for each in inputs]
    expected = ops.summary_pool(*exact, epsilon=epsilon)
    if not tokens.shape[1]:
        return expected, torch.zeros_like(expected)
    deviation = (tokens.var(-1, correction=0) + epsilon).sqrt()
    terms = (tokens.abs() + tokens.mean(-1, keepdim=True).abs()) * (norm_weight * score_weight[0]).abs()
    magnitude = (terms.sum(-1) / deviation).amax(1)[:, None, None]
    reach = tokens.abs().amax((1, 2), keepdim=True)
    return expected, _HALF_ULP[element] * expected.abs() + 2.0**-22 * (8 + magnitude) * reach


def gather_inputs(case: Gather, where: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random rows, and an index with rows that come twice, from the end, and not at all."""
    num_rows = case.data[-2]
    data = torch.randn(case.data, generator=generator).to(where, DTYPES[case.element])
    shape = (case.data[0], case.num_taken)
    index = torch.randint(-num_rows - 1, num_rows + 1, shape, generator=generator)
    return data, index.to(where)


def pool_inputs(case: Pool, where: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random tokens whose means differ from zero, and weights that make scores differ."""
    width = case.tokens[2]
    tokens = torch.randn(case.tokens, generator=generator) + torch.randn(*case.tokens[:2], 1, generator=generator)
    weights = [torch.randn(width, generator=generator) for _ in range(2)]
    scores = [torch.randn(1, width, generator=generator) * 4 * width**-0.5, torch.randn(1, generator=generator)]
    return tuple(each.to(where, DTYPES[case.element]) for each in (tokens, *weights, *scores))


def launch_gather(device: Device, case: Gather, inputs: Sequence[Tensor], output: Tensor) -> None:
    """Starts it."""
    launch = token_gather(case.data, tuple(inputs[1].shape), case.element, INTEGERS)
    device.launch(launch, case.element, inputs, output, num_blocks=1)


def launch_pool(device: Device, case: Pool, inputs: Sequence[Tensor], output: Tensor) -> None:
    """Starts it."""
    launch = summary_pool(case.tokens, case.element, EPSILON, case.num_blocks)
    device.launch(launch, case.element, inputs, output, num_blocks=case.num_blocks)


def poisoned(shape: Sequence[int], element: Element, where: str) -> Tensor:
    """NaN in every element, so that one which is not written is found."""
    numel = torch.Size(shape).numel() * DTYPES[element].itemsize
    return torch.full((numel,), _POISON, dtype=torch.uint8, device=where).view(DTYPES[element]).reshape(*shape)


def wrong_gather(device: Device, case: Gather, where: str, generator: torch.Generator) -> int:
    """Elements that are not exactly as promised."""
    inputs = gather_inputs(case, where, generator)
    expected = gathered(*inputs)
    output = poisoned(expected.shape, case.element, where)
    launch_gather(device, case, inputs, output)
    return int((output != expected).sum())  # a copy that waits for the kernel, which runs on the same stream


def wrong_pool(device: Device, case: Pool, where: str, generator: torch.Generator) -> int:
    """Elements further off than arithmetic in fp32 explains; NaN is."""
    inputs = pool_inputs(case, where, generator)
    expected, tolerance = pooled(inputs, case.element)
    output = poisoned(expected.shape, case.element, where)
    launch_pool(device, case, inputs, output)
    return int((~((output.double() - expected).abs() <= tolerance)).sum())


def check_cases(num_blocks: int) -> Iterator[Gather | Pool]:
    """Shapes that take every path of the kernels: whole, partial and scalar accesses, every team, no rows at all."""
    widths = (1, 3, 4, 8, 62, 64, 257, 1024, 1032, 3584, 4095, 4096, 4104, 8192)
    for element, width in product(ELEMENTS, widths):
        yield Gather(element, (2, 37, width), 53)
        yield Gather(element, (2, 3, 11, width), 7)
        for blocks in sorted({1, num_blocks}):
            yield Pool(element, (3, 97, width), blocks)
    for element in ELEMENTS:
        yield Gather(element, (1, 2880, 4096), 576)
        yield Gather(element, (1, 5, 64), 0)
        yield Gather(element, (1, 0, 64), 3)
        for rows in (0, 1, 2880):
            yield Pool(element, (2, rows, 1024), num_blocks)


def bandwidth_cases(num_blocks: int) -> Iterator[Gather | Pool]:
    """Shapes of a 7B model: visual tokens and caches, one picture and many."""
    for images in (1, 32):
        for rows, taken in ((576, 144), (2880, 576)):
            yield Gather("bf16", (images, rows, 4096), taken)
            yield Gather("bf16", (images, 8, rows, 128), taken)
            for blocks in sorted({1, num_blocks}):
                yield Pool("bf16", (images, rows, 4096), blocks)


def wrong(device: Device, case: Gather | Pool, where: str, generator: torch.Generator) -> int:
    """Elements of a case that are not as promised."""
    if isinstance(case, Gather):
        return wrong_gather(device, case, where, generator)
    return wrong_pool(device, case, where, generator)


def bandwidth(
    device: Device, case: Gather | Pool, where: str, rounds: int, timer_of: Callable[[Callable[[], None]], Timer]
) -> dict[str, Any]:
    """Bytes per second of a kernel and of a copy, in turn; `timer_of` makes a timer of what is to be timed."""
    turns = max(1, min(_LONGEST_TURN, _WORKING_SET // case.moved))
    generator = torch.Generator().manual_seed(0)
    runs: list[Callable[[], None]] = []
    copies: list[Callable[[], None]] = []
    for _ in range(turns):
        runs.append(_prepared(device, case, where, generator))
        source = torch.zeros(case.moved // 2, dtype=torch.uint8, device=where)
        copies.append(_copy(source, torch.empty_like(source)))
    timers = {"kernel": timer_of(_all(runs)), "copy": timer_of(_all(copies))}
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer() / turns)
    return {
        "microseconds": spread([1e6 * each for each in times["kernel"]]),
        "gigabytes_per_second": {name: 1e-9 * case.moved / spread(values)["median"] for name, values in times.items()},
        "share_of_copy": ratio(times["copy"], times["kernel"]),
    }


def _prepared(device: Device, case: Gather | Pool, where: str, generator: torch.Generator) -> Callable[[], None]:
    if isinstance(case, Gather):
        data, _ = gather_inputs(case, where, generator)
        # As the graphs take rows: each once, in rising order.
        drawn = torch.rand(case.data[0], case.data[-2], generator=generator).argsort(1)
        rows = (data, drawn[:, : case.num_taken].sort(1).values.contiguous().to(where))
        output = torch.empty(*case.data[:-2], case.num_taken, case.data[-1], dtype=data.dtype, device=where)
        return lambda: launch_gather(device, case, rows, output)
    inputs = pool_inputs(case, where, generator)
    summary = torch.empty(case.tokens[0], 1, case.tokens[2], dtype=inputs[0].dtype, device=where)
    return lambda: launch_pool(device, case, inputs, summary)


def _copy(source: Tensor, target: Tensor) -> Callable[[], None]:
    def run() -> None:
        target.copy_(source)

    return run


def _all(runs: Sequence[Callable[[], None]]) -> Callable[[], None]:
    def run() -> None:
        for each in runs:
            each()

    return run


class CudaDevice:
    """The current CUDA device of torch, through the driver API, on torch's current stream."""

    def __init__(self, target: str) -> None:
        self.driver: Any = import_module("cuda.bindings.driver")
        self.target = target
        self._functions: dict[tuple[str, int], Any] = {}

    def launch(
        self, launch: Launch, element: Element, inputs: Sequence[Tensor], output: Tensor, *, num_blocks: int
    ) -> None:
        """As in Device."""
        parameters = PackedParameters(launch, [each.data_ptr() for each in inputs], output.data_ptr())
        stream = torch.cuda.current_stream().cuda_stream
        function = self._function(launch.entry, element, num_blocks)
        grid, block = (launch.grid, 1, 1), (launch.block, 1, 1)
        self.call("cuLaunchKernel", function, *grid, *block, 0, stream, parameters.address, 0)

    def _function(self, entry: str, element: Element, num_blocks: int) -> Any:
        if (entry, num_blocks) not in self._functions:
            op = next(op for op in OPS if entry.startswith(KERNELS[op].name))
            # The driver wants text that ends with a zero.
            ptx = compiled(op, element, self.target, num_blocks=num_blocks) + b"\0"
            module = self.call("cuModuleLoadData", ptx)
            self._functions[entry, num_blocks] = self.call("cuModuleGetFunction", module, entry.encode())
        return self._functions[entry, num_blocks]

    def call(self, function: str, *arguments: Any) -> Any:
        """One call of the driver. Ends the program where it fails."""
        status, *results = getattr(self.driver, function)(*arguments)
        if int(status) != 0:
            raise SystemExit(f"{function} failed: {self.driver.cuGetErrorName(status)[1].decode()}")
        return results[0] if results else None


def cuda_timer(run: Callable[[], None]) -> Timer:
    """Times `run` as a CUDA graph, so that what the CPU does between launches is not in it."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def seconds() -> float:
        return between_events(graph.replay)

    return seconds


def between_events(run: Callable[[], object]) -> float:
    """Seconds from the first to the last of what `run` starts on the GPU."""
    events: Any = torch.cuda.Event  # untyped
    start, end = events(enable_timing=True), events(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def open_device() -> tuple[CudaDevice, dict[str, Any]]:
    """torch's current CUDA device, and what there is to say about it.

    Raises NoDevice, CompilerMissing, TargetError or DriverTooOld.
    """
    if not torch.cuda.is_available():
        raise NoDevice("no CUDA device that torch can use: this check needs an NVIDIA GPU and torch with CUDA")
    torch.zeros(1, device=WHERE)  # makes torch's context the current one, which modules are loaded into
    try:
        device = CudaDevice(target_for(*torch.cuda.get_device_capability()))
    except ModuleNotFoundError:
        raise NoDevice("this check needs cuda-bindings: pip install cuda-bindings") from None
    compiler = find_compiler()
    driver = device.call("cuDriverGetVersion")
    check_driver(compiler, driver)
    return device, {
        "gpu": torch.cuda.get_device_name(),
        "target": device.target,
        "driver_cuda": driver,
        "compiler": f"{compiler.name} {compiler.version}",
    }


def described(case: Gather | Pool) -> dict[str, Any]:
    """A case as it is written down."""
    if isinstance(case, Gather):
        return {"op": "TokenGather", "dtype": case.element, "data": list(case.data), "taken": case.num_taken}
    return {"op": "SummaryPool", "dtype": case.element, "tokens": list(case.tokens), "blocks": case.num_blocks}


def check(device: Device, where: str, cases: Iterable[Gather | Pool]) -> int:
    """How many cases are right. Ends the program where one is not."""
    generator = torch.Generator().manual_seed(0)
    checked, failed = 0, 0
    for case in cases:
        count = wrong(device, case, where, generator)
        checked += 1
        if count:
            failed += 1
            print(f"{count} elements are wrong: {case}", file=sys.stderr)
    if failed:
        raise SystemExit(f"{failed} of {checked} cases are wrong")
    return checked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    results = surroundings(torch.get_num_threads())
    try:
        device, found = open_device()
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(NO_DEVICE) from None
    num_blocks = pool_blocks(device.target)
    checked = check(device, WHERE, check_cases(num_blocks))
    print(f"{checked} cases are right")
    measured = []
    for case in bandwidth_cases(num_blocks):
        measured.append(described(case) | bandwidth(device, case, WHERE, options.rounds, cuda_timer))
        print(measured[-1])
    write_results(results | found | {"rounds": options.rounds, "checked": checked, "cases": measured}, RESULT)


if __name__ == "__main__":
    main()
