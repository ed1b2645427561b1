"""The check for a GPU, with a driver behind it that runs the kernels on the CPU: all but the timing is real."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import blocks, gpu_check, kernel_cases
from benchmarks.gpu_check import CudaDevice, DriverError, NoDevice, bandwidth, check, fitting
from benchmarks.kernel_cases import Case, Gather, Pool, fault, gather_inputs, pool_inputs
from benchmarks.measuring import RESULTS
from svcli_engines.plugins.compile import SOURCE
from svcli_engines.plugins.launch import ELEMENTS, KERNELS, Element, Launch, Op
from svcli_engines.plugins.nvrtc import CompileError
from tests.plugins.cpu_device import CpuDevice

ROOT = Path(__file__).parents[2]
CASES: list[Case] = [
    *(Gather(element, (2, 5, 9), 7) for element in ELEMENTS),
    Gather("fp16", (2, 3, 5, 16), 4, shift=1),
    Gather("fp32", (1, 0, 4), 2),
    Gather("fp32", (1, 3, 4), 0),
    *(Gather(element, (2, 5, 10), 7, "bits") for element in ELEMENTS),
    *(Pool(element, (2, 11, 24)) for element in ELEMENTS),
    *(Pool(element, (3, 11, 24), "special") for element in ELEMENTS),
    *(Pool(element, (2, 11, 24), "subnormal", shift=1) for element in ELEMENTS),
    Pool("bf16", (2, 1, 64), "patterns"),
    Pool("fp32", (1, 0, 8)),
]
NUM_GATHERS = sum(isinstance(case, Gather) for case in CASES)


def driver_on_the_cpu(cpu: CpuDevice, calls: list[str]) -> ModuleType:
    """`cuda.bindings.driver`, as far as it is used: memory is the CPU's, and so is what runs."""
    driver = ModuleType("cuda.bindings.driver")

    def load(ptx: bytes) -> tuple[int, Any]:
        calls.append("load")
        assert ptx.endswith(b"\0")
        entry, element = ptx[:-1].decode().split()
        return 0, (entry, element)

    def function(module: Any, name: bytes) -> tuple[int, Any]:
        return (0, module) if module[0] == name.decode() else (500, None)

    def launch(module: Any, *arguments: int) -> tuple[int]:
        gx, gy, gz, bx, by, bz, shared, _stream, parameters, extra = arguments
        assert (gy, gz, by, bz, shared, extra) == (1, 1, 1, 1, 0, 0)
        entry, element = module
        cpu.launch_packed(entry, gx, bx, parameters, element)
        calls.append(entry)
        return (0,)

    driver.__dict__.update(
        cuModuleLoadData=load,
        cuModuleGetFunction=function,
        cuLaunchKernel=launch,
        cuDriverGetVersion=lambda: (0, 13000),
        cuGetErrorName=lambda _: (0, b"CUDA_ERROR_NOT_FOUND"),
    )
    return driver


@pytest.fixture
def calls() -> list[str]:
    """Modules loaded and kernels launched."""
    return []


@pytest.fixture
def device(cpu: CpuDevice, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    def compiled(op: Op, element: Element, target: str) -> bytes:
        assert target == "sm_90"
        return f"{KERNELS[op].name}_{element} {element}".encode()

    monkeypatch.setattr(gpu_check, "compiled", compiled)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver_on_the_cpu(cpu, calls))
    return CudaDevice("sm_90")


def broken(tmp_path: Path, cpu: CpuDevice, before: str, after: str) -> ModuleType:
    """A driver behind which runs a kernel with a fault."""
    changed = tmp_path / "kernels.cu"
    source = SOURCE.read_text(encoding="utf-8")
    assert source.count(before) == 1
    changed.write_text(source.replace(before, after), encoding="utf-8")
    return driver_on_the_cpu(cpu.with_source(changed), [])


def test_right_kernels_are_right(device: CudaDevice, calls: list[str]) -> None:
    assert check(device, "cpu", CASES, repeats=2) == (len(CASES), [])
    assert calls.count("load") == 3 * len(ELEMENTS)
    num_pools = len(CASES) - NUM_GATHERS
    assert len(calls) - calls.count("load") == NUM_GATHERS + 2 * 2 * num_pools


@pytest.mark.parametrize(
    ("before", "after", "wrong", "reason"),
    [
        ("if (picked < 0) picked += num_rows;", "picked += picked < 0 ? num_rows : 1;", "TokenGather", "by up to "),
        ("    sum *= rescale;\n", "", "SummaryPool", "by up to "),
        ("summary[static", "if (column != 3) summary[static", "SummaryPool", "the first at [0, 0, 3], by up to inf"),
    ],
)
def test_what_is_wrong_is_told_and_the_rest_goes_on(
    tmp_path: Path,
    cpu: CpuDevice,
    device: CudaDevice,
    before: str,
    after: str,
    wrong: str,
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    device.driver = broken(tmp_path, cpu, before, after)
    cases: list[Case] = [Gather("fp32", (2, 5, 9), 7), Pool("fp32", (2, 600, 24)), Gather("fp32", (2, 5, 9), 0)]
    checked, found = check(device, "cpu", cases, repeats=1)
    assert checked == 3
    (told,) = found
    assert told["op"] == wrong
    assert "elements are wrong, the first at [" in told["fault"]
    assert reason in told["fault"]
    assert told["fault"] in capsys.readouterr().err


def test_a_pool_that_is_not_the_same_each_time_is_found(device: CudaDevice) -> None:
    launch, launches = device.driver.cuLaunchKernel, []

    def unsteady(*arguments: Any) -> Any:
        answer = launch(*arguments)
        launches.append(arguments)
        if len(launches) == 6:  # the third merge
            outputs[-1].view(torch.int32)[0, 0, 5] ^= 1
        return answer

    outputs: list[torch.Tensor] = []
    poisoned = kernel_cases.poisoned

    def kept(*arguments: Any) -> torch.Tensor:
        outputs.append(poisoned(*arguments))
        return outputs[-1]

    device.driver.__dict__["cuLaunchKernel"] = unsteady
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_cases, "poisoned", kept)
        found = fault(device, Pool("fp32", (2, 11, 24)), torch.Generator().manual_seed(0), repeats=4)
    assert found is not None
    assert (found.wrong, found.first) == (1, (0, 0, 5))
    assert len(launches) == 6


def test_what_the_driver_refuses_is_told_and_the_rest_goes_on(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Any = vars(gpu_check)["compiled"]

    def compiled(op: Op, element: Element, target: str) -> bytes:
        return b"other fp32" if op == "SummaryMerge" else bytes(right(op, element, target))

    monkeypatch.setattr(gpu_check, "compiled", compiled)
    checked, found = check(device, "cpu", [Pool("fp32", (1, 2, 8)), CASES[0]], repeats=1)
    assert checked == 2
    assert [(each["op"], each["fault"]) for each in found] == [
        ("SummaryPool", "DriverError: cuModuleGetFunction failed: CUDA_ERROR_NOT_FOUND")
    ]
    with pytest.raises(DriverError):
        fault(device, Pool("fp32", (1, 2, 8)), torch.Generator(), repeats=1)


def test_what_the_compiler_refuses_is_told_too(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: object) -> bytes:
        raise CompileError("NVRTC refused kernels.cu for sm_90: line 1\nline 2")

    monkeypatch.setattr(gpu_check, "compiled", compiled)
    _, found = check(device, "cpu", [CASES[0]], repeats=1)
    assert [each["fault"] for each in found] == ["CompileError: NVRTC refused kernels.cu for sm_90: line 1"]


@pytest.mark.parametrize("element", ELEMENTS)
def test_bits_hold_all_kinds_of_numbers(element: Element) -> None:
    data, _ = gather_inputs(Gather(element, (1, 300, 1000), 3, "bits"), torch.Generator().manual_seed(0))
    tiny = torch.finfo(data.dtype).tiny
    assert data.isnan().any()
    assert ((data != 0) & (data.abs() < tiny)).any()
    assert data.shape == (1, 300, 1000)
    if element != "fp32":  # of 2**32 patterns two are infinities
        assert data.isinf().any()
        assert len(set(data.view(torch.int16).flatten().tolist())) > 0.95 * 2**16


def test_all_numbers_of_16_bits_are_pooled() -> None:
    for element, count in (("fp16", 2 * 0x7C00), ("bf16", 2 * 0x714A)):
        (case,) = (
            case
            for case in kernel_cases.check_cases()
            if isinstance(case, Pool) and (case.element, case.values) == (element, "patterns")
        )
        tokens = pool_inputs(case, torch.Generator())[0]
        assert len(set(tokens.view(torch.int16).flatten().tolist())) == count
    below, beyond = torch.tensor([0x7149, 0x714A]).to(torch.int16).view(torch.bfloat16).tolist()
    assert below < 1e30 <= beyond


@pytest.mark.parametrize("case", [Gather("fp16", (1, 3, 64), 2, shift=1), Pool("fp16", (1, 3, 64), shift=1)])
def test_shifted_cases_are_off_every_access(case: Case) -> None:
    device = Recorder()
    fault(device, case, torch.Generator(), repeats=1)
    assert all(address % 4 == 2 for address in (device.addresses[0], device.addresses[-1]))


class Recorder:
    """Runs nothing and notes where the first input and the output of each launch are."""

    def __init__(self) -> None:
        self.addresses: list[int] = []

    def launch(self, launch: Launch, element: Element, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
        assert launch.entry.endswith(element)
        self.addresses += [inputs[0].data_ptr(), output.data_ptr()]


def test_large_cases_are_left_to_devices_that_hold_them() -> None:
    large = list(kernel_cases.large_cases())
    for case, needed in large:
        read = torch.Size(case.data if isinstance(case, Gather) else case.tokens).numel()
        written = case.num_taken * case.data[-1] if isinstance(case, Gather) else 0
        assert max(read, written) > 2**31
        assert needed > 2 * max(read, written) * 2
    assert fitting(large, 2**36) == ([case for case, _ in large], [])
    kept, left = fitting(large, 2**34)
    assert (len(kept), len(left)) == (1, 2)


@pytest.mark.parametrize(
    ("case", "moved"),
    [
        (Gather("bf16", (2, 9, 64), 5), 2 * 2 * 5 * 64 * 2 + 2 * 5 * 8),
        (Gather("fp32", (2, 3, 9, 16), 5), 2 * 2 * 3 * 5 * 16 * 4 + 2 * 5 * 8),
        (Pool("fp16", (2, 9, 64)), (2 * 9 + 2 + 2) * 64 * 2),
    ],
)
def test_bandwidth_is_bytes_by_time(device: CudaDevice, case: Case, moved: int) -> None:
    """A kernel that takes twice as long as the copy of as many bytes has half of its bandwidth."""
    ticks = cycle([2e-3, 1e-3])
    ran: list[int] = []

    def timer_of(run: Callable[[], None]) -> Callable[[], float]:
        run()
        ran.append(1)
        took = next(ticks)
        return lambda: took

    gpu_check_turns = 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "_LONGEST_TURN", gpu_check_turns)
        found = bandwidth(device, case, "cpu", 5, 10.0, timer_of)
    assert case.moved == moved
    assert len(ran) == 2
    assert found["share_of_copy"]["ratio"] == pytest.approx(0.5)
    assert found["copy_in_floors"] == pytest.approx(100 / gpu_check_turns)
    assert found["microseconds"]["median"] == pytest.approx(2e3 / gpu_check_turns)
    assert found["gigabytes_per_second"]["kernel"] == pytest.approx(1e-9 * moved * gpu_check_turns / 2e-3)


def test_no_share_is_given_where_launches_are_what_takes_time(device: CudaDevice) -> None:
    shares = [
        bandwidth(device, CASES[0], "cpu", 3, floor, lambda _: lambda: 256 * 1e-3)["share_of_copy"]
        for floor in (101.0, 99.0)
    ]
    assert shares[0] is None
    assert shares[1]["ratio"] == pytest.approx(1.0)


def test_the_copy_is_a_kernel_of_as_many_bytes(device: CudaDevice) -> None:
    """A copy without arithmetic may become a node of another kind in a graph."""
    seen: list[int] = []
    bitwise_not: Any = torch.bitwise_not

    def spy(source: torch.Tensor, *, out: torch.Tensor) -> None:
        seen.append(source.numel() * source.itemsize + out.numel() * out.itemsize)
        bitwise_not(source, out=out)

    def timer_of(run: Callable[[], None]) -> Callable[[], float]:
        run()
        return lambda: 1e-3

    case = Gather("bf16", (1, 9, 64), 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "_LONGEST_TURN", 2)
        patch.setattr(torch, "bitwise_not", spy)
        bandwidth(device, case, "cpu", 1, 1.0, timer_of)
    assert len(seen) == 2
    assert all(case.moved - 8 < each <= case.moved for each in seen)


SAID = {"gpu": "a card", "target": "sm_90", "driver_cuda": 13000, "compiler": "nvrtc 13.0"}


@pytest.fixture
def program(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The whole program on the CPU, with arguments."""
    monkeypatch.setattr(gpu_check, "open_device", lambda: (device, SAID))
    monkeypatch.setattr(gpu_check, "WHERE", "cpu")
    monkeypatch.setattr(gpu_check, "_LONGEST_TURN", 1)
    monkeypatch.setattr(gpu_check, "_REPEATS", 2)
    monkeypatch.setattr(gpu_check, "check_cases", lambda: CASES)
    monkeypatch.setattr(gpu_check, "free_memory", lambda: 0)
    monkeypatch.setattr(gpu_check, "bandwidth_cases", lambda: [CASES[3], CASES[9]])
    monkeypatch.setattr(gpu_check, "cuda_timer", lambda _run: lambda: 1e-3)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
        gpu_check.main()

    return run


def test_results_say_where_they_are_from(
    program: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "deep" / "gpu_check.json"
    program("--rounds", "2", "--result", str(path))
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written.items() >= SAID.items()
    assert {"date", "machine", "versions"} <= written.keys()
    assert (written["checked"], written["wrong"], written["failed"], written["rounds"]) == (len(CASES), [], [], 2)
    assert written["launch_floor_microseconds"]["median"] == pytest.approx(1000)
    assert len(written["left_out"]) == len(list(kernel_cases.large_cases()))
    assert [case["op"] for case in written["cases"]] == ["TokenGather", "SummaryPool"]
    said = capsys.readouterr().out
    assert f"{len(CASES)} of {len(CASES)} cases are right" in said
    assert said.count("left out, for want of memory") == 3
    # The documents quote it.
    written["versions"] |= {"torch": "2.13.0"}
    written["cases"][0]["share_of_copy"] = {"ratio": 0.875}
    monkeypatch.setattr(blocks, "result", lambda _: written)
    table = blocks.kernels()
    assert "| TokenGather fp16, 4 rows of 2x3x5x16 | 1e+03 us | 0 GB/s | 87.5 % |" in table
    assert "| SummaryPool fp32, 2x11x24 | 1e+03 us | 0 GB/s |  |" in table
    assert f"{len(CASES)} of {len(CASES)} cases answered as PyTorch does. The smallest launch takes 1e+03 us" in table


def test_the_default_is_where_documents_look() -> None:
    assert gpu_check.RESULT == RESULTS / "gpu_check.json"


def test_a_failure_while_measuring_leaves_what_was_measured(
    program: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, path = gpu_check.bandwidth, tmp_path / "found.json"
    seen: list[Any] = []

    def failing(*arguments: Any) -> dict[str, Any]:
        if seen:
            seen.append(json.loads(path.read_text(encoding="utf-8")))
            raise DriverError("cuLaunchKernel failed: CUDA_ERROR_LAUNCH_FAILED")
        seen.append(None)
        return measure(*arguments)

    monkeypatch.setattr(gpu_check, "bandwidth", failing)
    with pytest.raises(SystemExit) as raised:
        program("--result", str(path))
    assert raised.value.code == 1
    before, after = seen[1], json.loads(path.read_text(encoding="utf-8"))
    assert len(before["cases"]) == len(after["cases"]) == 1
    assert after["failed"] == ["DriverError: cuLaunchKernel failed: CUDA_ERROR_LAUNCH_FAILED"]


def test_documents_quote_nothing_of_a_run_that_measured_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "result", lambda _: {"checked": 3, "wrong": [], "cases": [], "failed": ["a reason"]})
    with pytest.raises(blocks.NotMeasuredError, match="no kernel was measured"):
        blocks.kernels()


def test_wrong_answers_are_written_down_and_are_exit_code_1(
    program: Callable[..., None], tmp_path: Path, cpu: CpuDevice, device: CudaDevice
) -> None:
    device.driver = broken(tmp_path, cpu, "if (picked < 0) picked += num_rows;", "")
    path = tmp_path / "found.json"
    with pytest.raises(SystemExit) as raised:
        program("--rounds", "1", "--result", str(path))
    assert raised.value.code == 1
    written = json.loads(path.read_text(encoding="utf-8"))
    assert {each["op"] for each in written["wrong"]} == {"TokenGather"}
    assert len(written["cases"]) == 2


def test_a_check_alone_measures_and_writes_nothing(
    program: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_check, "few_cases", lambda: CASES[:2])
    program("--check-only", "--result", str(tmp_path / "found.json"))
    assert capsys.readouterr().out == "2 of 2 cases are right\n"
    assert list(tmp_path.glob("*.json")) == []


def test_few_cases_are_right_and_take_every_team(device: CudaDevice) -> None:
    cases = list(kernel_cases.few_cases())
    assert check(device, "cpu", cases, repeats=1) == (len(cases), [])
    pools = [case for case in cases if isinstance(case, Pool)]
    assert {sum(case.tokens[2] > limit for limit in (1024, 4096)) for case in pools} == {0, 1, 2}
    assert any(case.tokens[2] % 8 for case in pools)


@pytest.mark.parametrize("rounds", ["0", "-3"])
def test_no_rounds_are_refused(
    rounds: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", f"--rounds={rounds}"])
    with pytest.raises(SystemExit) as raised:
        gpu_check.main()
    assert raised.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"argument --rounds: there must be at least one round, not {rounds}")


def test_the_cases_take_every_path() -> None:
    cases = list(kernel_cases.check_cases())
    assert {case.element for case in cases} == set(ELEMENTS)
    pools = [case for case in cases if isinstance(case, Pool)]
    gathers = [case for case in cases if isinstance(case, Gather)]
    assert {sum(case.tokens[2] > limit for limit in (1024, 4096)) for case in pools} == {0, 1, 2}
    assert {case.values for case in pools} == {"normal", "subnormal", "special", "patterns"}
    assert {case.values for case in gathers} == {"normal", "bits"}
    assert all({0, 1} <= {case.shift for case in group} for group in (pools, gathers))
    assert {case.tokens[1] for case in pools} >= {0, 1, 8, 9}
    remainders = {case.data[-1] * kernel_cases.DTYPES[case.element].itemsize % 16 for case in gathers}
    assert {0, 2, 4, 8} <= remainders
    assert all(case.moved >= 2**17 for case in kernel_cases.bandwidth_cases())


def test_inputs_are_made_where_they_are_used() -> None:
    """Not copied there: `meta` has no numbers, and lets none in from elsewhere."""
    for case in kernel_cases.bandwidth_cases():
        generator = SimpleNamespace(device=torch.device("meta"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "normal_", lambda self, **_: self)
            patch.setattr(torch, "randint", lambda _low, _high, shape, **_: torch.empty(shape, device="meta"))
            make: Any = gather_inputs if isinstance(case, Gather) else pool_inputs
            assert {each.device.type for each in make(case, generator)} == {"meta"}


def test_neither_pydantic_nor_onnx_is_needed() -> None:
    """A rare machine with a GPU may have torch, NumPy and cuda-bindings only."""
    script = (
        "import sys\n"
        "for name in ('pydantic', 'onnx', 'onnxruntime', 'tensorrt', 'typer', 'rich', 'PIL', 'tokenizers'):\n"
        "    sys.modules[name] = None\n"
        "import torch\n"
        "from benchmarks import gpu_check, kernel_cases\n"
        "case = kernel_cases.Pool('fp32', (2, 5, 8))\n"
        "inputs = kernel_cases.pool_inputs(case, torch.Generator())\n"
        "assert kernel_cases.pooled(inputs, 'fp32')[0].shape == (2, 1, 8)\n"
        "data, index = kernel_cases.gather_inputs(kernel_cases.Gather('fp32', (1, 5, 8), 3), torch.Generator())\n"
        "assert kernel_cases.gathered(data, index).shape == (1, 3, 8)\n"
        "sys.argv = ['gpu_check']\n"
        "torch.cuda.is_available = lambda: False\n"
        "gpu_check.main()\n"
    )
    paths = ":".join(str(ROOT / part) for part in (".", "export", "engines"))
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == gpu_check.NO_DEVICE, done.stderr
    assert done.stderr.startswith("no CUDA device")


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as raised:
        gpu_check.main()
    assert raised.value.code == gpu_check.NO_DEVICE == 3
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "needs an NVIDIA GPU and torch with CUDA" in error


def test_without_the_drivers_package_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check, "WHERE", "cpu")
    for name in ("cuda.bindings", "cuda.bindings.driver"):  # the latter may have been imported before
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NoDevice, match="pip install cuda-bindings"):
        gpu_check.open_device()


@pytest.mark.usefixtures("device")
def test_the_device_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(gpu_check, "WHERE", "cpu")
    monkeypatch.setattr(gpu_check, "find_compiler", lambda: SimpleNamespace(name="nvrtc", version="13.0"))
    found = gpu_check.open_device()[1]
    assert found == SAID
