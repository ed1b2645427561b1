"""What this machine has: Python, packages, ONNX Runtime, CUDA, TensorRT, room. What works with it: abilities.py.

Versions come from the packages' metadata. What only an import or a driver can tell is asked in a process of its own and
under a time limit, so that a broken or hanging installation is a fact here. Imports nothing but the standard library:
this file is also the program that asks libcuda.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SECONDS = 30.0
"""How long an import or a driver may take to answer; one that nothing keeps awake wakes one GPU after the other."""
PACKAGES: dict[str, tuple[str, ...]] = {
    "numpy": ("numpy",),
    "pillow": ("pillow",),
    "tokenizers": ("tokenizers",),
    "jinja2": ("jinja2",),
    "pydantic": ("pydantic",),
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-gpu": ("onnxruntime-gpu",),
    "torch": ("torch",),
    "safetensors": ("safetensors",),
    "onnx": ("onnx",),
    "resvg-py": ("resvg-py",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    "polygraphy": ("polygraphy",),
    "cuda-bindings": ("cuda-bindings",),
    "nvrtc": ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12"),
}
"""Names of distributions that bring each package, the usual one first."""
_PYTHON = (sys.executable, "-I", "-W", "ignore")
_LIBCUDA = "libcuda.so.1"
_CUDA_ERRORS = {
    34: "the library is a stub that only links",
    100: "no GPU",
    802: "the GPU is not ready yet",
    803: "driver and library are of different versions",
    804: "the driver is too old for this library",
    999: "unknown error",
}
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*."""


@dataclass(frozen=True)
class Package:
    """One package; `distribution` and `version` are None where it is not installed."""

    name: str
    distribution: str | None
    version: str | None


@dataclass(frozen=True)
class OnnxRuntime:
    """What importing it says."""

    version: str | None = None
    providers: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Torch:
    """What PyTorch was built for."""

    cuda: str | None = None
    """Such as `13.0`; None where it is built for the CPU alone, or not installed."""


@dataclass(frozen=True)
class Gpu:
    """One GPU; None is what the driver would not say."""

    name: str
    compute_capability: str | None
    """Such as `8.9`."""
    memory_bytes: int | None


@dataclass(frozen=True)
class Cuda:
    """The NVIDIA driver and its GPUs."""

    driver: str | None = None
    """Such as `580.65.06`."""
    cuda: str | None = None
    """Newest CUDA that the driver runs, such as `13.0`."""
    gpus: tuple[Gpu, ...] = ()
    source: str | None = None
    """Who named the GPUs: `nvidia-smi` or `libcuda`."""
    problem: str | None = None
    """Why programs cannot use a GPU; None where they can."""


@dataclass(frozen=True)
class TensorRT:
    """One flavour, `tensorrt` or `tensorrt-rtx`."""

    name: str
    version: str | None = None
    """As its module says; None where it cannot be imported."""
    problem: str | None = None


@dataclass(frozen=True)
class Plugins:
    """Our TensorRT plugins."""

    compiler: str | None = None
    """What compiles their kernels, such as `nvrtc 13.0`."""
    problem: str | None = None


@dataclass(frozen=True)
class Model:
    """The model that comes with svcli."""

    path: str
    precision: str | None = None
    problem: str | None = None
    """None where all hashes are good."""


@dataclass(frozen=True)
class Place:
    """A folder that svcli reads or writes, and the room there."""

    name: str
    path: str
    exists: bool
    free_bytes: int


@dataclass(frozen=True)
class Machine:
    """The computer, as far as this process may use it."""

    platform: str
    cores: int
    memory_bytes: int | None
    memory_available_bytes: int | None


@dataclass(frozen=True)
class Environment:
    """All of it."""

    python: str
    executable: str
    machine: Machine
    packages: tuple[Package, ...]
    onnxruntime: OnnxRuntime
    torch: Torch
    cuda: Cuda
    tensorrt: tuple[TensorRT, ...]
    plugins: Plugins
    model: Model
    places: tuple[Place, ...]

    def version(self, package: str) -> str | None:
        """None where it is not installed."""
        return next(each.version for each in self.packages if each.name == package)


def look(model: Path, places: Mapping[str, Path]) -> Environment:
    """The facts. `model`: the bundled one; `places`: folders by name."""
    packages = tuple(package(name) for name in PACKAGES)
    installed = {package.name for package in packages if package.version is not None}
    with ThreadPoolExecutor() as pool:  # each waits for a process of its own
        runtime = pool.submit(_onnxruntime, bool(installed & {"onnxruntime", "onnxruntime-gpu"}))
        cuda = pool.submit(find_cuda)
        flavours = [pool.submit(_tensorrt, name, name in installed) for name in ("tensorrt", "tensorrt-rtx")]
        plugins = pool.submit(_plugins)
        checked = _model(model)
    return Environment(
        python=platform.python_version(),
        executable=sys.executable,
        machine=_machine(),
        packages=packages,
        onnxruntime=runtime.result(),
        torch=_torch(),
        cuda=cuda.result(),
        tensorrt=tuple(flavour.result() for flavour in flavours),
        plugins=plugins.result(),
        model=checked,
        places=tuple(_place(name, path) for name, path in places.items()),
    )


def package(name: str) -> Package:
    """One of `PACKAGES`, by its metadata."""
    for distribution in PACKAGES[name]:
        with suppress(metadata.PackageNotFoundError):
            # A damaged installation has metadata without a version.
            return Package(name, distribution, metadata.version(distribution) or "unknown")
    return Package(name, None, None)


def _onnxruntime(installed: bool) -> OnnxRuntime:
    if not installed:
        return OnnxRuntime(problem="not installed")
    facts, problem = _imported("onnxruntime", "[m.__version__, m.get_available_providers()]")
    return OnnxRuntime(facts[0], tuple(facts[1])) if problem is None else OnnxRuntime(problem=problem)


def _torch() -> Torch:
    """By the file that torch keeps this in, as its import takes seconds."""
    with suppress(OSError, ImportError):
        found = find_spec("torch")
        if found is not None and found.origin is not None:
            text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
            built = re.search(r"^cuda\b.*=\s*'([\d.]+)'", text, re.MULTILINE)
            return Torch(built[1] if built else None)
    return Torch()


def _tensorrt(name: str, installed: bool) -> TensorRT:
    if not installed:
        return TensorRT(name, problem="not installed")
    version, problem = _imported(name.replace("-", "_"), "m.__version__")
    return TensorRT(name, version) if problem is None else TensorRT(name, problem=problem)


def _imported(module: str, expression: str) -> tuple[Any, str | None]:
    """The value of `expression` over the module `m`, asked in another process; or None and what went wrong."""
    # The same packages as here, and none from the working folder: a file there may be named like one of them.
    path = [folder for folder in sys.path if folder]
    code = f"import json, sys; sys.path[:] = {path!r}; import {module} as m; print(json.dumps({expression}))"
    output, problem = _ask([*_PYTHON, "-c", code])
    if problem is not None:
        return None, problem
    try:
        return json.loads(output.splitlines()[-1]), None
    except (ValueError, IndexError):
        return None, "its import printed what could not be read"


def find_cuda() -> Cuda:
    """libcuda names the GPUs, in the order in which programs count them, and nvidia-smi the driver, or GPUs as well."""
    output, problem = _ask([*_PYTHON, __file__])
    if problem is None:
        data = json.loads(output)
        library = Cuda(**{**data, "gpus": tuple(Gpu(**gpu) for gpu in data["gpus"])})
    else:
        library = Cuda(problem=f"{_LIBCUDA}: {problem}")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return library
    fields = "driver_version,name,compute_cap,memory.total"
    output, problem = _ask([tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines() if line.count(",") == 3]
    if problem is not None or not rows:
        reason = problem or "it names no GPU"
        return library if library.gpus else replace(library, problem=f"nvidia-smi: {reason}; {library.problem}")
    gpus = tuple(Gpu(name, _capability(number), _mebibytes(memory)) for _, name, number, memory in rows)
    return replace(library, driver=rows[0][0], gpus=library.gpus or gpus, source=library.source or "nvidia-smi")


def read_libcuda(library: Any) -> Cuda:
    """What the driver's library says; `library` is it, loaded by ctypes."""
    driver = driver_version()
    version, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else None
    error = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    if error or count.value == 0:
        return Cuda(driver, cuda, problem=f"CUDA cannot be used: {_CUDA_ERRORS.get(error or 100, f'error {error}')}")
    gpus = []
    for number in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        library.cuDeviceGet(ctypes.byref(device), number)
        library.cuDeviceGetName(name, 256, device)
        for value, attribute in ((major, _MAJOR), (minor, _MINOR)):
            library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        capability = f"{major.value}.{minor.value}"
        gpus.append(Gpu(name.value.decode(errors="replace"), capability, memory.value))
    return Cuda(driver, cuda, tuple(gpus), "libcuda")


def driver_version() -> str | None:
    """Of the NVIDIA driver's part in the kernel; None without one."""
    with suppress(OSError):
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
        return next((word for word in words if word.replace(".", "").isdigit() and "." in word), None)
    return None


def _capability(text: str) -> str | None:
    return text if text.replace(".", "", 1).isdigit() else None


def _mebibytes(text: str) -> int | None:
    return int(text) << 20 if text.isdigit() else None


def _plugins() -> Plugins:
    described = "' '.join([(c := m.find_compiler()).name, c.version])"
    compiler, problem = _imported("svcli_engines.plugins.compile", described)
    return Plugins(compiler, problem and problem.partition(": ")[2])


def _model(path: Path) -> Model:
    try:
        from svcli_export.manifest import load_manifest

        return Model(str(path), load_manifest(path).contract.precision)
    except (ImportError, ValueError, OSError) as error:
        return Model(str(path), problem=str(error))


def _place(name: str, path: Path) -> Place:
    path = path.absolute()
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    return Place(name, str(path), path.exists(), shutil.disk_usage(nearest).free)


def _machine() -> Machine:
    sizes: dict[str, int] = {}
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, size = line.split(":")
            sizes[name] = int(size.split()[0]) << 10
    cores = len(os.sched_getaffinity(0))
    return Machine(platform.platform(), cores, sizes.get("MemTotal"), sizes.get("MemAvailable"))


def _ask(command: Sequence[str]) -> tuple[str, str | None]:
    """What a program prints; and what went wrong, in one line, or None."""
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    try:
        process = subprocess.Popen(command, stdin=nothing, stdout=pipe, stderr=pipe, text=True, errors="replace")
    except OSError as error:
        return "", error.strerror or str(error)
    try:
        output, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        # A process that waits inside a driver does not even die.
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=1)
        return "", f"no answer within {SECONDS:.0f} seconds"
    if process.returncode < 0:
        return output, f"ended by {signal.Signals(-process.returncode).name}"
    if process.returncode:
        lines = (errors.strip() or output.strip()).splitlines()
        return output, lines[-1] if lines else f"exit code {process.returncode}"
    return output, None


def _tell() -> None:
    """Writes what libcuda says to stdout, for `find_cuda`."""
    try:
        found = read_libcuda(ctypes.CDLL(_LIBCUDA))
    except (OSError, AttributeError) as error:
        absent = "No such file" in str(error)
        problem = f"{_LIBCUDA} is not there" if absent else f"{_LIBCUDA} cannot be used ({error})"
        found = Cuda(driver=driver_version(), problem=problem)
    sys.stdout.write(json.dumps(asdict(found)))


if __name__ == "__main__":
    _tell()
