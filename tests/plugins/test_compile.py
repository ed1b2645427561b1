"""Compiling ahead of time: PTX for every target, its parameters, the cache, and what is said without a compiler."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest

from svcli_engines.plugins import compile as kernels
from svcli_engines.plugins.compile import (
    SOURCE,
    TARGETS,
    CompilerMissing,
    DriverTooOld,
    Nvcc,
    TargetError,
    cache_folder,
    check_driver,
    compiled,
    find_compiler,
    target_for,
)
from svcli_engines.plugins.launch import ELEMENTS, KERNELS, OPS, Element, Op, defines, entry_name
from svcli_engines.plugins.nvrtc import CompileError, Form, Nvrtc

MOST_SPILLED = 16
"""Bytes: a register or two."""
WIDE_LOAD = r"ld\.global\.(?:nc\.)?v4\.[ubf]32"


@dataclass
class FakeCompiler:
    name: str = "fake"
    version: str = "13.0"
    asked: list[tuple[str, Form, list[str]]] = field(default_factory=list)

    def compile(self, source: str, target: str, options: Sequence[str], form: Form) -> tuple[bytes, str]:
        assert source == SOURCE.read_text(encoding="utf-8")
        self.asked.append((target, form, list(options)))
        return f"{form} for {target}".encode(), ""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    compiler = FakeCompiler()
    monkeypatch.setattr(kernels, "find_compiler", lambda: compiler)
    return compiler


def parameter_types(ptx: str) -> dict[str, list[str]]:
    """For each entry the types of its parameters, in order."""
    entries = re.findall(r"\.visible \.entry (\w+)\s*\(([^)]*)\)", ptx)
    return {name: re.findall(r"\.param\s+\.(\w+)", parameters) for name, parameters in entries}


def assert_loads_stand_together(ptx: str, constants: dict[str, int]) -> None:
    """All indices of a thread, then all that they point at, and nothing in between that could part those: no branch
    back, no store. A load that is skipped jumps over itself only."""
    kinds = {"index": r"ld\.global\.(?:nc\.)?[ubs]64 ", "data": WIDE_LOAD, "store": r"st\.global\.v4\.[ubf]32"}
    marks = sorted((match.start(), kind) for kind, each in kinds.items() for match in re.finditer(each, ptx))
    wide = [place for place, kind in marks if kind == "data"]
    before = [kind for place, kind in marks if place < wide[0]]
    unroll = constants["SVCLI_GATHER_UNROLL"]
    assert before[-unroll:] == ["index"] * unroll
    behind = [kind for place, kind in marks if place >= wide[0]]
    assert behind[: 2 * unroll] == ["data"] * unroll + ["store"] * unroll


def options_for(op: Op, element: Element) -> list[str]:
    return ["--std=c++17", *(f"-D{name}={value}" for name, value in defines(op, element).items())]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.usefixtures("nvrtc")
def test_ptx_has_one_entry_with_the_parameters_in_tensorrts_order(target: str) -> None:
    for op, element in product(OPS, ELEMENTS):
        kernel = KERNELS[op]
        ptx = compiled(op, element, target).decode("ascii")
        pointers, sizes = ["u64"] * len(kernel.inputs), ["u32"] * len(kernel.extras)
        assert parameter_types(ptx) == {entry_name(op, element): [*pointers, *sizes, "u64"]}
        assert re.search(r"^\.target (\w+)$", ptx, re.MULTILINE)[1] == target  # type: ignore[index]
        (threads,) = (value for name, value in defines(op, element).items() if name.endswith("_THREADS"))
        assert f".maxntid {threads}" in ptx
        if op != "SummaryMerge":  # whose warps read side by side as it is
            # Wide accesses are what bandwidth is made of.
            assert re.search(WIDE_LOAD, ptx)
        if op == "TokenGather":
            assert_loads_stand_together(ptx, constants=defines(op, element))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_75", "sm_90", "sm_120"])
def test_the_code_is_assembled_and_rows_stay_in_registers(nvrtc: Nvrtc, target: str) -> None:
    source = SOURCE.read_text(encoding="utf-8")
    for op, element in product(OPS, ELEMENTS):
        options = [*options_for(op, element), "--ptxas-options=-v"]
        code, log = nvrtc.compile(source, target, options, "cubin")
        assert code.startswith(b"\x7fELF")
        (spilled,) = re.findall(r"(\d+) bytes spill loads", log)
        assert int(spilled) <= MOST_SPILLED, log


def test_a_fault_in_the_source_is_the_compilers_to_tell(nvrtc: Nvrtc) -> None:
    with pytest.raises(CompileError, match=r"refused kernels\.cu for sm_80: .*undefined"):
        nvrtc.compile("__global__ void kernel() { missing(); }", "sm_80", [], "ptx")


def test_nvcc_is_asked_for_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in that writes what it was asked for: the options are those of nvcc."""
    script = tmp_path / "nvcc"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo "Cuda compilation tools, release 12.8, V12.8.93"; exit; }\n'
        'grep -q summary_partial kernels.cu || exit 3\necho "$@" > out\n',
        encoding="utf-8",
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(kernels, "find_nvrtc", lambda: None)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    compiler = find_compiler()
    assert (compiler.name, compiler.version) == ("nvcc", "12.8")
    asked = compiled("SummaryPartial", "fp16", "sm_89", "cubin").decode()
    assert asked.startswith("--cubin -arch=sm_89 --std=c++17 -DSVCLI_SUMMARY_PARTIAL=1 -DSVCLI_FP16=1 ")
    assert asked.endswith("-o out kernels.cu\n")


def test_what_nvcc_says_is_passed_on(tmp_path: Path) -> None:
    script = tmp_path / "nvcc"
    script.write_text('#!/bin/sh\necho "kernels.cu(1): error: no" >&2\nexit 2\n', encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(CompileError, match=r"nvcc refused kernels\.cu for sm_80: kernels\.cu\(1\): error: no"):
        Nvcc(str(script)).compile("", "sm_80", [], "ptx")


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "find_nvrtc", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(CompilerMissing, match='pip install "nvidia-cuda-nvrtc') as raised:
        compiled("TokenGather", "fp32", "sm_80")
    assert len(str(raised.value).splitlines()) == 1


def test_code_is_compiled_once(fake: FakeCompiler) -> None:
    assert [compiled("TokenGather", "fp16", "sm_80") for _ in range(2)] == [b"ptx for sm_80"] * 2
    assert len(fake.asked) == 1


def test_whatever_the_code_depends_on_is_in_its_name(fake: FakeCompiler) -> None:
    variants: list[tuple[Op, Element, str, Form]] = [
        ("TokenGather", "fp16", "sm_80", "ptx"),
        ("SummaryPartial", "fp16", "sm_80", "ptx"),
        ("SummaryMerge", "fp16", "sm_80", "ptx"),
        ("TokenGather", "bf16", "sm_80", "ptx"),
        ("TokenGather", "fp16", "sm_86", "ptx"),
        ("TokenGather", "fp16", "sm_80", "cubin"),
    ]
    for variant in variants:
        compiled(*variant)
    fake.version = "13.1"
    compiled(*variants[0])
    assert len(fake.asked) == len(list(cache_folder().iterdir())) == 7


def test_the_cache_holds_whole_files_only(fake: FakeCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiled("TokenGather", "fp16", "sm_80")
    assert list(cache_folder().iterdir()) == []
    assert len(fake.asked) == 1


def test_a_cache_that_cannot_be_written_is_done_without(fake: FakeCompiler) -> None:
    cache_folder().parent.mkdir(parents=True)
    cache_folder().write_text("no folder")
    assert [compiled("TokenGather", "fp16", "sm_80") for _ in range(2)] == [b"ptx for sm_80"] * 2
    assert len(fake.asked) == 2


def test_other_targets_are_refused(fake: FakeCompiler) -> None:
    with pytest.raises(TargetError, match=r"compiled for sm_75, .*, not for sm_70"):
        compiled("TokenGather", "fp16", "sm_70")
    assert fake.asked == []


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((7, 5), "sm_75"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 1), "sm_120"),
    ],
)
def test_a_gpu_gets_the_newest_target_that_it_runs(capability: tuple[int, int], target: str) -> None:
    assert target_for(*capability) == target


def test_gpus_before_turing_are_refused() -> None:
    with pytest.raises(TargetError, match=r"compute capability 7\.0 is too old"):
        target_for(7, 0)


@pytest.mark.parametrize(("version", "driver"), [("13.0", 13000), ("12.8", 13000), ("12.8", 12090), ("unknown", 12000)])
def test_a_driver_takes_ptx_of_its_own_cuda_and_older(version: str, driver: int) -> None:
    check_driver(FakeCompiler(version=version), driver)


@pytest.mark.parametrize(
    ("version", "driver", "package"),
    [("13.5", 13000, "nvidia-cuda-nvrtc==13.0.*"), ("13.0", 12080, "nvidia-cuda-nvrtc-cu12==12.8.*")],
)
def test_a_driver_older_than_the_compiler_is_refused(version: str, driver: int, package: str) -> None:
    with pytest.raises(DriverTooOld, match=re.escape(f'pip install "{package}"')):
        check_driver(FakeCompiler(version=version), driver)
