"""Facts about a machine come out right, and whatever is broken or hangs is one of them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from svcli_engines import environment
from svcli_engines.environment import PACKAGES, Cuda, Environment, Gpu, Plugins, Torch, look, read_libcuda
from tests.engines.conftest import Exported

PLACES = {"here": Path()}


@pytest.fixture
def found(exported: Exported) -> Environment:
    return look(exported.bundle, PLACES)


def distribution(folder: Path, name: str, content: str) -> None:
    info = folder / f"{name.replace('-', '_')}-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(content)


def test_versions_come_from_metadata(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "nvidia-cuda-nvrtc", "Metadata-Version: 2.1\nName: nvidia-cuda-nvrtc\nVersion: 99.1\n")
    distribution(
        tmp_path, "tensorrt-cu13-bindings", "Metadata-Version: 2.1\nName: tensorrt-cu13-bindings\nVersion: 9\n"
    )
    distribution(tmp_path, "polygraphy", "Metadata-Version: 2.1\nName: polygraphy\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    real = metadata.version

    def version(name: str) -> str:
        if name in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "torch"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = look(exported.bundle, PLACES)
    assert [package.name for package in found.packages] == list(PACKAGES)
    packages = {package.name: package for package in found.packages}
    assert (packages["nvrtc"].distribution, packages["nvrtc"].version) == ("nvidia-cuda-nvrtc", "99.1")
    assert packages["tensorrt"].distribution == "tensorrt-cu13-bindings"
    assert packages["polygraphy"].version == "unknown"
    assert (packages["torch"].distribution, found.version("torch")) == (None, None)
    assert found.version("numpy") == real("numpy")


def test_onnxruntime_says_what_it_provides(found: Environment) -> None:
    import onnxruntime

    assert found.onnxruntime.version == onnxruntime.__version__
    assert "CPUExecutionProvider" in found.onnxruntime.providers
    assert found.onnxruntime.problem is None


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("raise ImportError('libonnx.so: no such file')", "ImportError: libonnx.so: no such file"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("import time; time.sleep(60)", "no answer within 1 seconds"),
        ("print('hello'); import sys; sys.exit(0)", "its import printed what could not be read"),
        ("__version__ = '1'", "AttributeError: module 'onnxruntime' has no attribute 'get_available_providers'"),
    ],
    ids=["import error", "crash", "hang", "noise", "another module"],
)
def test_a_broken_onnxruntime_is_a_fact(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, problem: str
) -> None:
    (tmp_path / "onnxruntime.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(environment, "SECONDS", 1.0 if "sleep" in source else 30.0)
    start = time.monotonic()
    found = look(exported.bundle, PLACES).onnxruntime
    assert found.problem is not None
    assert found.problem.startswith(problem)
    assert (found.version, found.providers) == (None, ())
    assert time.monotonic() - start < 40


def test_a_file_in_the_working_folder_is_not_mistaken_for_a_package(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('a file of mine')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    monkeypatch.setenv("PYTHONPATH", "")
    assert look(exported.bundle, PLACES).onnxruntime.problem is None


@pytest.mark.parametrize(
    ("line", "cuda"), [("cuda: Optional[str] = '13.0'", "13.0"), ("cuda: Optional[str] = None", None), ("", None)]
)
def test_pytorch_is_for_the_cuda_that_it_was_built_with(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, cuda: str | None
) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not asked')")
    (package / "version.py").write_text(f"debug = False\n{line}\nhip: Optional[str] = '6.0'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch")
    assert look(exported.bundle, {}).torch == Torch(cuda)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_is_asked_whether_it_imports(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    usual = PACKAGES[name][0]
    distribution(tmp_path, usual, f"Metadata-Version: 2.1\nName: {usual}\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / f"{name.replace('-', '_')}.py"

    def flavour() -> Any:
        return next(each for each in look(exported.bundle, PLACES).tensorrt if each.name == name)

    module.write_text("__version__ = '9.9.1'")
    assert (flavour().version, flavour().problem) == ("9.9.1", None)
    module.write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    assert flavour().version is None
    assert "libnvinfer.so.11" in flavour().problem


def test_plugins_name_what_compiles_their_kernels(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "svcli_engines" / "plugins"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    compile_py = package / "compile.py"
    compile_py.write_text("class C:\n    name, version = 'nvrtc', '13.0'\nfind_compiler = C")
    assert look(exported.bundle, PLACES).plugins == Plugins("nvrtc 13.0")
    compile_py.write_text("def find_compiler():\n    raise ValueError('there is none: pip install one')")
    assert look(exported.bundle, PLACES).plugins == Plugins(problem="there is none: pip install one")


def test_plugins_are_found_or_it_is_said_what_they_lack(found: Environment) -> None:
    compiler, problem = found.plugins.compiler, found.plugins.problem
    assert (compiler is None) == (problem is not None)
    if compiler is None:
        assert problem is not None
        assert "CUDA compiler" in problem
    else:
        assert compiler.split()[0] in ("nvrtc", "nvcc")


class Driver:
    """libcuda as ctypes shows it, with as many GPUs as it is given."""

    def __init__(self, gpus: list[tuple[bytes, int, int, int]], error: int = 0) -> None:
        self._gpus, self._error = gpus, error

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self._error

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13010
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self._gpus)
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = number + 40  # a handle is not a number
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:
        assert size == len(name)
        name.value = self._gpus[device.value - 40][0]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:
        value._obj.value = self._gpus[device.value - 40][{75: 1, 76: 2}[attribute]]
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: ctypes.c_int) -> int:
        size._obj.value = self._gpus[device.value - 40][3]
        return 0


def test_libcuda_names_its_gpus() -> None:
    found = read_libcuda(Driver([(b"NVIDIA L4", 8, 9, 24 << 30), (b"NVIDIA H200", 9, 0, 140 << 30)]))
    assert found.gpus == (Gpu("NVIDIA L4", "8.9", 24 << 30), Gpu("NVIDIA H200", "9.0", 140 << 30))
    assert (found.cuda, found.source, found.problem) == ("13.1", "libcuda", None)


@pytest.mark.parametrize(
    ("driver", "problem"),
    [
        (Driver([]), "no GPU"),
        (Driver([(b"x", 8, 0, 1)], error=100), "no GPU"),
        (Driver([(b"x", 8, 0, 1)], error=803), "driver and library are of different versions"),
        (Driver([(b"x", 8, 0, 1)], error=4711), "error 4711"),
    ],
)
def test_a_driver_that_does_not_work_is_a_fact(driver: Driver, problem: str) -> None:
    found = read_libcuda(driver)
    assert found.problem == f"CUDA cannot be used: {problem}"
    assert found.gpus == ()


@pytest.fixture
def no_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing on it, and a libcuda that cannot be loaded, whatever this machine has."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    (tmp_path / "libcuda.so.1").write_bytes(b"no library")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    return folder


def nvidia_smi(folder: Path, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


@pytest.mark.usefixtures("no_tools")
def test_without_any_driver_the_reason_is_named(exported: Exported) -> None:
    found = look(exported.bundle, PLACES).cuda
    assert (found.gpus, found.source, found.cuda) == ((), None, None)
    assert found.problem is not None
    assert found.problem.startswith("libcuda.so.1 cannot be used (")


def test_nvidia_smi_names_the_gpus(exported: Exported, no_tools: Path) -> None:
    rows = "580.65.06, NVIDIA H200, 9.0, 143771\\n580.65.06, NVIDIA H200 MIG 1g, [N/A], [N/A]\\n"
    nvidia_smi(no_tools, f'test "$2" = "--format=csv,noheader,nounits" && printf "{rows}"')
    found = look(exported.bundle, PLACES).cuda
    assert found.gpus == (Gpu("NVIDIA H200", "9.0", 143771 << 20), Gpu("NVIDIA H200 MIG 1g", None, None))
    assert (found.driver, found.source) == ("580.65.06", "nvidia-smi")
    # The tool answers and the library does not, as in a container that was given only half of the driver.
    assert found.problem is not None
    assert "libcuda.so.1" in found.problem


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo couldn\\'t communicate with the driver; exit 9", "couldn't communicate with the driver"),
        ("while :; do :; done", "no answer within 1 seconds"),
        ("echo No devices were found", "it names no GPU"),
    ],
    ids=["fails", "hangs", "no GPU"],
)
def test_an_nvidia_smi_that_does_not_answer_is_a_fact(
    exported: Exported, no_tools: Path, monkeypatch: pytest.MonkeyPatch, script: str, problem: str
) -> None:
    nvidia_smi(no_tools, script)
    if "while" in script:
        answers = environment._ask

        def hurried(command: list[str]) -> tuple[str, str | None]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(environment, "SECONDS", 1.0 if "nvidia-smi" in command[0] else 30.0)
                return answers(command)

        monkeypatch.setattr(environment, "_ask", hurried)
        found = environment.find_cuda()
    else:
        found = look(exported.bundle, PLACES).cuda
    assert found.problem is not None
    assert found.problem.startswith(f"nvidia-smi: {problem}; libcuda.so.1")
    assert found.gpus == ()


FAKE_LIBCUDA = """
#include <stdio.h>
#include <stddef.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Test GPU %d", device); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute - 70; return 0; }
int cuDeviceTotalMem_v2(size_t *size, int device) { *size = (size_t)48 << 30; return 0; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to make a libcuda with")
def test_libcuda_is_asked_in_a_process_of_its_own_and_orders_the_gpus(
    exported: Exported, tmp_path: Path, no_tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "libcuda.c"
    source.write_text(FAKE_LIBCUDA)
    compiler = shutil.which("cc", path=os.defpath + ":/usr/local/bin:/usr/bin")
    assert compiler is not None
    folder = tmp_path / "driver"
    folder.mkdir()
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True, env={"PATH": "/usr/bin:/bin"}
    )
    monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))
    found = look(exported.bundle, PLACES).cuda
    assert found.gpus == (Gpu("Test GPU 0", "5.6", 48 << 30),)
    assert (found.cuda, found.source, found.problem) == ("12.8", "libcuda", None)
    # nvidia-smi counts by slot, and does not know which of them this process may see.
    nvidia_smi(no_tools, 'printf "570.1, Other GPU, 8.0, 40960\\n570.1, Test GPU 0, 5.6, 49152\\n"')
    beside = look(exported.bundle, PLACES).cuda
    assert (beside.driver, beside.gpus, beside.source) == ("570.1", found.gpus, "libcuda")


def test_the_model_is_hashed(found: Environment, exported: Exported, tmp_path: Path) -> None:
    assert (found.model.precision, found.model.problem) == ("fp32", None)
    copy = Path(shutil.copytree(exported.bundle, tmp_path / "copy"))
    (copy / "tokenizer.json").write_text("{}")
    damaged = look(copy, PLACES).model
    assert damaged.problem is not None
    assert "tokenizer.json" in damaged.problem
    absent = look(tmp_path / "absent", PLACES).model
    assert absent.problem is not None
    assert "no such bundle folder" in absent.problem


def test_places_say_where_and_how_much_room(exported: Exported, tmp_path: Path) -> None:
    places = {"there": tmp_path, "to come": tmp_path / "a" / "b"}
    there, to_come = look(exported.bundle, places).places
    assert (there.name, there.path, there.exists) == ("there", str(tmp_path), True)
    assert (to_come.path, to_come.exists) == (str(tmp_path / "a" / "b"), False)
    assert there.free_bytes > 0
    assert abs(there.free_bytes - to_come.free_bytes) < 1 << 30


def test_the_machine_is_described(found: Environment) -> None:
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    assert found.executable == sys.executable
    assert found.machine.cores == len(os.sched_getaffinity(0))
    assert found.machine.memory_bytes is not None
    assert found.machine.memory_available_bytes is not None
    assert 0 < found.machine.memory_available_bytes <= found.machine.memory_bytes


_LIGHT = """
import sys
from pathlib import Path
from svcli_engines.abilities import abilities
from svcli_engines.environment import look
before = set(sys.modules)
assert not {"numpy", "pydantic"} & before
found = look(Path(sys.argv[1]), {})
assert abilities(found)[0].works, found
unwanted = {"torch", "onnx", "onnxruntime", "PIL", "tokenizers", "tensorrt", "safetensors", "jinja2"} & set(sys.modules)
assert not unwanted, unwanted
"""


def test_looking_imports_nothing_heavy(exported: Exported) -> None:
    child = {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", _LIGHT, str(exported.bundle)], check=True, env=child)


def test_facts_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Cuda().driver = "1"  # type: ignore[misc]
