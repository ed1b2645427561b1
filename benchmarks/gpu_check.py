"""The plugins' kernels on a CUDA device: right answers, and their bandwidth beside a copy of as many bytes.

    python -m benchmarks.gpu_check [--rounds N] [--result PATH] [--check-only]

Needs torch with CUDA, NumPy, cuda-bindings and a CUDA compiler; no TensorRT, ONNX or pydantic. PTX as it goes into a
plan is loaded with the CUDA driver API and launched with the parameters, in the order and with the dimensions that
TensorRT is given. Outputs are poisoned first. What is wrong is printed and written down, and the rest goes on.

In every round a kernel and a copy that moves as many bytes run in turn; the copy is element by element, since one
without arithmetic may not be run by a kernel. Where that takes no more than ten times what the smallest launch takes,
no share of its bandwidth is given. Results are written after each case.

--check-only runs few cases and writes nothing: for `compute-sanitizer`.

Exit code 3 where there is no CUDA device, 1 where a kernel answers wrongly or not at all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases import (
    Case,
    Device,
    Gather,
    bandwidth_cases,
    check_cases,
    described,
    fault,
    few_cases,
    gather_inputs,
    large_cases,
    launch_gather,
    launch_pool,
    poisoned,
    pool_inputs,
)
from benchmarks.measuring import RESULTS, ratio, spread, surroundings, write_results
from svcli_engines.plugins.compile import check_driver, compiled, find_compiler, target_for
from svcli_engines.plugins.launch import KERNELS, OPS, Element, Launch, PackedParameters

RESULT = RESULTS / "gpu_check.json"
WHERE = "cuda"
NO_DEVICE = 3
LEAST_FLOORS = 10
"""A copy that takes fewer launch floors than this says nothing of bandwidth."""
_REPEATS = 20
_WORKING_SET = 2**30
"""Bytes that a measurement goes through, so that no cache holds them."""
_LONGEST_TURN = 256

_FAILURES = (RuntimeError, ValueError)
"""The driver's, torch's where a kernel has broken its context, and the compiler's."""

Timer = Callable[[], float]
"""Seconds that one run took."""


class NoDevice(ValueError):
    """There is nothing to run on; the message says what is missing."""


class DriverError(RuntimeError):
    """A call of the driver that failed; the message says which, and how."""


def check(device: Device, where: str, cases: Iterable[Case], repeats: int) -> tuple[int, list[dict[str, Any]]]:
    """How many cases there are, and those that are wrong, with what is. Prints each as it is found."""
    generator = torch.Generator(where).manual_seed(0)
    checked = 0
    wrong: list[dict[str, Any]] = []
    for case in cases:
        checked += 1
        try:
            found = fault(device, case, generator, repeats)
        except _FAILURES as error:
            reason = _reason(error)
        else:
            if found is None:
                continue
            reason = str(found)
        wrong.append(described(case) | {"fault": reason})
        print(f"{case}: {reason}", file=sys.stderr, flush=True)
    return checked, wrong


def fitting(cases: Iterable[tuple[Case, int]], free: int) -> tuple[list[Case], list[dict[str, Any]]]:
    """The cases that `free` bytes are enough for, and the others, described."""
    pairs = list(cases)
    return [case for case, needed in pairs if needed <= free], [
        described(case) for case, needed in pairs if needed > free
    ]


def launch_floor(
    device: Device, where: str, rounds: int, timer_of: Callable[[Callable[[], None]], Timer]
) -> dict[str, float]:
    """Microseconds of the smallest launch there is: a gather of one row."""
    run = _prepared(device, Gather("bf16", (1, 1, 8), 1), torch.Generator(where).manual_seed(0))
    timer = timer_of(_all([run] * _LONGEST_TURN))
    return spread([1e6 * timer() / _LONGEST_TURN for _ in range(rounds)])


def bandwidth(
    device: Device,
    case: Case,
    where: str,
    rounds: int,
    floor: float,
    timer_of: Callable[[Callable[[], None]], Timer],
) -> dict[str, Any]:
    """Bytes per second of a kernel and of a copy, in turn; `timer_of` makes a timer of what is to be timed.

    The share of the copy's is None where the copy takes too few launch floors; `floor` is in microseconds.
    """
    turns = max(1, min(_LONGEST_TURN, _WORKING_SET // case.moved))
    generator = torch.Generator(where).manual_seed(0)
    runs: list[Callable[[], None]] = []
    copies: list[Callable[[], None]] = []
    for _ in range(turns):
        runs.append(_prepared(device, case, generator))
        source = torch.zeros(case.moved // 8, dtype=torch.int32, device=where)
        copies.append(_copy(source, torch.empty_like(source)))
    timers = {"kernel": timer_of(_all(runs)), "copy": timer_of(_all(copies))}
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer() / turns)
    floors = 1e6 * spread(times["copy"])["median"] / floor
    return {
        "microseconds": spread([1e6 * each for each in times["kernel"]]),
        "gigabytes_per_second": {name: 1e-9 * case.moved / spread(values)["median"] for name, values in times.items()},
        "copy_in_floors": floors,
        "share_of_copy": ratio(times["copy"], times["kernel"]) if floors > LEAST_FLOORS else None,
    }


def _prepared(device: Device, case: Case, generator: torch.Generator) -> Callable[[], None]:
    where = generator.device
    if isinstance(case, Gather):
        data, _ = gather_inputs(case, generator)
        # As the graphs take rows: each once, in rising order.
        drawn = torch.rand(case.data[0], case.data[-2], generator=generator, device=where).argsort(1)
        rows = (data, drawn[:, : case.num_taken].sort(1).values.contiguous())
        output = torch.empty(*case.data[:-2], case.num_taken, case.data[-1], dtype=data.dtype, device=where)
        return lambda: launch_gather(device, case, rows, output)
    inputs = pool_inputs(case, generator)
    partial = poisoned(case.partial, "fp32", where)
    summary = torch.empty(case.tokens[0], 1, case.tokens[2], dtype=inputs[0].dtype, device=where)
    return lambda: launch_pool(device, case, inputs, partial, summary)


def _copy(source: Tensor, target: Tensor) -> Callable[[], None]:
    def run() -> None:
        torch.bitwise_not(source, out=target)

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
        self._functions: dict[str, Any] = {}

    def launch(self, launch: Launch, element: Element, inputs: Sequence[Tensor], output: Tensor) -> None:
        """As in Device. Raises DriverError."""
        parameters = PackedParameters(launch, [each.data_ptr() for each in inputs], output.data_ptr())
        stream = torch.cuda.current_stream().cuda_stream
        function = self._function(launch.entry, element)
        grid, block = (launch.grid, 1, 1), (launch.block, 1, 1)
        self.call("cuLaunchKernel", function, *grid, *block, 0, stream, parameters.address, 0)

    def _function(self, entry: str, element: Element) -> Any:
        if entry not in self._functions:
            op = next(op for op in OPS if entry.startswith(KERNELS[op].name))
            # The driver wants text that ends with a zero.
            module = self.call("cuModuleLoadData", compiled(op, element, self.target) + b"\0")
            self._functions[entry] = self.call("cuModuleGetFunction", module, entry.encode())
        return self._functions[entry]

    def call(self, function: str, *arguments: Any) -> Any:
        """One call of the driver. Raises DriverError."""
        status, *results = getattr(self.driver, function)(*arguments)
        if int(status) != 0:
            raise DriverError(f"{function} failed: {self.driver.cuGetErrorName(status)[1].decode()}")
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


def free_memory() -> int:
    """Bytes that the device has left."""
    return int(torch.cuda.mem_get_info()[0])


def _at_least_one(text: str) -> int:
    rounds = int(text)
    if rounds < 1:
        raise argparse.ArgumentTypeError(f"there must be at least one round, not {rounds}")
    return rounds


def measure(device: Device, rounds: int, results: dict[str, Any], path: Path) -> None:
    """The launch floor, then each case; `results` are written after each, so that what was measured is not lost."""
    results |= {"rounds": rounds, "cases": [], "failed": []}
    try:
        floor = launch_floor(device, WHERE, rounds, cuda_timer)
        print(f"launch floor: {floor['median']:.3g} us", flush=True)
        results["launch_floor_microseconds"] = floor
        for case in bandwidth_cases():
            found = bandwidth(device, case, WHERE, rounds, floor["median"], cuda_timer)
            results["cases"].append(described(case) | found)
            print(results["cases"][-1], flush=True)
            write_results(results, path)
    except _FAILURES as error:
        results["failed"].append(_reason(error))
        print(results["failed"][-1], file=sys.stderr, flush=True)
        write_results(results, path)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=_at_least_one, default=30)
    parser.add_argument("--result", type=Path, default=RESULT, help="where results are written (%(default)s)")
    parser.add_argument("--check-only", action="store_true", help="few cases, and no measurement")
    options = parser.parse_args()
    results: dict[str, Any] = surroundings(torch.get_num_threads())
    try:
        device, found = open_device()
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(NO_DEVICE) from None
    if options.check_only:
        checked, wrong = check(device, WHERE, few_cases(), repeats=2)
    else:
        large, left_out = fitting(large_cases(), free_memory())
        for each in left_out:
            print(f"left out, for want of memory: {each}", flush=True)
        checked, wrong = check(device, WHERE, [*check_cases(), *large], _REPEATS)
        results |= found | {"checked": checked, "wrong": wrong, "left_out": left_out}
    print(f"{checked - len(wrong)} of {checked} cases are right", flush=True)
    if not options.check_only:
        write_results(results, options.result)
        measure(device, options.rounds, results, options.result)
    if wrong or results.get("failed"):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
