"""The check for a GPU, with a driver behind it that runs the kernels on the CPU: all but the timing is real."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import CudaDevice, Gather, NoDevice, Pool, bandwidth, check, wrong
from svcli_engines.plugins.compile import SOURCE
from svcli_engines.plugins.launch import ELEMENTS, Element, Op, pool_blocks
from tests.plugins.cpu_device import CpuDevice

BLOCKS = 2
CASES: list[Gather | Pool] = [
    *(Gather(element, (2, 5, 9), 7) for element in ELEMENTS),
    Gather("fp16", (2, 3, 5, 16), 4),
    Gather("fp32", (1, 0, 4), 2),
    Gather("fp32", (1, 3, 4), 0),
    *(Pool(element, (2, 11, 24), BLOCKS) for element in ELEMENTS),
    Pool("fp32", (1, 0, 8), 1),
]


def driver_on_the_cpu(cpu: CpuDevice, calls: list[str]) -> ModuleType:
    """`cuda.bindings.driver`, as far as it is used: memory is the CPU's, and so is what runs."""
    driver = ModuleType("cuda.bindings.driver")

    def load(ptx: bytes) -> tuple[int, Any]:
        calls.append("load")
        assert ptx.endswith(b"\0")
        entry, element, blocks = ptx[:-1].decode().split()
        return 0, (entry, element, int(blocks))

    def function(module: Any, name: bytes) -> tuple[int, Any]:
        return (0, module) if module[0] == name.decode() else (500, None)

    def launch(module: Any, *arguments: int) -> tuple[int]:
        gx, gy, gz, bx, by, bz, shared, _stream, parameters, extra = arguments
        assert (gy, gz, by, bz, shared, extra) == (1, 1, 1, 1, 0, 0)
        entry, element, blocks = module
        cpu.launch_packed(entry, gx, bx, parameters, element, blocks)
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
    def compiled(op: Op, element: Element, target: str, num_blocks: int) -> bytes:
        assert target == "sm_90"
        name = {"TokenGather": "token_gather", "SummaryPool": "summary_pool"}[op]
        return f"{name}_{element} {element} {num_blocks}".encode()

    monkeypatch.setattr(gpu_check, "compiled", compiled)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver_on_the_cpu(cpu, calls))
    return CudaDevice("sm_90")


def test_right_kernels_are_right(device: CudaDevice, calls: list[str]) -> None:
    assert check(device, "cpu", CASES) == len(CASES)
    assert calls.count("load") == 2 * len(ELEMENTS) + 1  # one more for the other number of blocks
    assert len(calls) == len(CASES) + calls.count("load")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("if (picked < 0) picked += num_rows;", "picked += picked < 0 ? num_rows : 1;"),
        ("weighted[i] *= rescale;", ""),
        ("summary[at] = from_float", "if (at != 3) summary[at] = from_float"),
    ],
)
def test_a_wrong_kernel_ends_the_check(
    tmp_path: Path,
    cpu: CpuDevice,
    device: CudaDevice,
    before: str,
    after: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = tmp_path / "kernels.cu"
    changed.write_text(SOURCE.read_text(encoding="utf-8").replace(before, after), encoding="utf-8")
    device.driver = driver_on_the_cpu(cpu.with_source(changed), [])
    with pytest.raises(SystemExit, match=r"\d of 2 cases are wrong"):
        check(device, "cpu", [Gather("fp32", (2, 5, 9), 7), Pool("fp32", (2, 40, 24), 1)])
    assert "elements are wrong: " in capsys.readouterr().err


def test_what_the_driver_refuses_ends_the_check(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "compiled", lambda *_, **__: b"other fp32 1")
    with pytest.raises(SystemExit, match="cuModuleGetFunction failed: CUDA_ERROR_NOT_FOUND"):
        wrong(device, CASES[0], "cpu", torch.Generator())


@pytest.mark.parametrize(
    ("case", "moved"),
    [
        (Gather("bf16", (2, 9, 64), 5), 2 * 2 * 5 * 64 * 2 + 2 * 5 * 8),
        (Gather("fp32", (2, 3, 9, 16), 5), 2 * 2 * 3 * 5 * 16 * 4 + 2 * 5 * 8),
        (Pool("fp16", (2, 9, 64), 1), (2 * 9 + 2 + 2) * 64 * 2),
    ],
)
def test_bandwidth_is_bytes_by_time(device: CudaDevice, case: Gather | Pool, moved: int) -> None:
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
        found = bandwidth(device, case, "cpu", 5, timer_of)
    assert case.moved == moved
    assert len(ran) == 2
    assert found["share_of_copy"]["ratio"] == pytest.approx(0.5)
    assert found["microseconds"]["median"] == pytest.approx(2e3 / gpu_check_turns)
    assert found["gigabytes_per_second"]["kernel"] == pytest.approx(1e-9 * moved * gpu_check_turns / 2e-3)


def test_results_say_where_they_are_from(
    device: CudaDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"gpu": "a card", "target": "sm_90", "driver_cuda": 13000, "compiler": "nvrtc 13.0"}
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--rounds", "2"])
    monkeypatch.setattr(gpu_check, "open_device", lambda: (device, said))
    monkeypatch.setattr(gpu_check, "WHERE", "cpu")
    monkeypatch.setattr(gpu_check, "RESULT", tmp_path / "gpu_check.json")
    monkeypatch.setattr(gpu_check, "_LONGEST_TURN", 1)
    monkeypatch.setattr(gpu_check, "check_cases", lambda _: CASES)
    monkeypatch.setattr(gpu_check, "bandwidth_cases", lambda _: [CASES[3], CASES[6]])
    monkeypatch.setattr(gpu_check, "cuda_timer", lambda _run: lambda: 1e-3)
    gpu_check.main()
    written = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert written.items() >= said.items()
    assert {"date", "machine", "versions"} <= written.keys()
    assert written["checked"] == len(CASES)
    assert [case["op"] for case in written["cases"]] == ["TokenGather", "SummaryPool"]
    assert f"{len(CASES)} cases are right" in capsys.readouterr().out


def test_the_cases_take_every_path() -> None:
    cases = list(gpu_check.check_cases(8))
    assert {case.element for case in cases} == set(ELEMENTS)
    pools = [case for case in cases if isinstance(case, Pool)]
    assert {case.num_blocks for case in pools} == {1, 8}
    assert {sum(case.tokens[2] > limit for limit in (1024, 4096)) for case in pools} == {0, 1, 2}
    remainders = {
        case.data[-1] * gpu_check.DTYPES[case.element].itemsize % 16 for case in cases if isinstance(case, Gather)
    }
    assert {0, 2, 4, 8} <= remainders
    assert all(case.moved >= 2**17 for case in gpu_check.bandwidth_cases(8))


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
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
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
    assert found == {"gpu": "a card", "target": "sm_90", "driver_cuda": 13000, "compiler": "nvrtc 13.0"}
    assert pool_blocks(found["target"]) == 8
