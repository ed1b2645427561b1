"""kernels.cu compiled ahead of time to PTX or cubin, by NVRTC or nvcc, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from svcli_engines.plugins.launch import Element, Op, defines
from svcli_engines.plugins.nvrtc import CompileError, Form, find_nvrtc

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SOURCE = Path(__file__).parent / "kernels.cu"


class CompilerMissing(ValueError):
    """There is neither NVRTC nor nvcc; the message says what to install."""


class TargetError(ValueError):
    """A GPU that the kernels are not compiled for; the message lists those they are."""


class DriverTooOld(ValueError):
    """The driver does not read what the compiler writes; the message says which compiler fits."""


class Compiler(Protocol):
    """What turns the source into code for a GPU."""

    @property
    def name(self) -> str:
        """`nvrtc` or `nvcc`."""

    @property
    def version(self) -> str:
        """Of CUDA. A driver loads PTX of no newer CUDA than its own."""

    def compile(self, source: str, target: str, options: Sequence[str], form: Form) -> tuple[bytes, str]:
        """The code, and the compiler's messages. Raises CompileError."""


@dataclass(frozen=True)
class Nvcc:
    """The compiler of an installed CUDA toolkit."""

    path: str

    @property
    def name(self) -> str:
        return "nvcc"

    @property
    def version(self) -> str:
        shown = subprocess.run([self.path, "--version"], capture_output=True, text=True, check=False).stdout
        found = re.search(r"release (\d+\.\d+)", shown)
        return found[1] if found else "unknown"

    def compile(self, source: str, target: str, options: Sequence[str], form: Form) -> tuple[bytes, str]:
        """As Nvrtc.compile."""
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            (place / "kernels.cu").write_text(source, encoding="utf-8")
            command = [self.path, f"--{form}", f"-arch={target}", *options, "-o", "out", "kernels.cu"]
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise CompileError(f"nvcc refused kernels.cu for {target}: {done.stderr.strip()}")
            return (place / "out").read_bytes(), done.stderr.strip()


def find_compiler() -> Compiler:
    """NVRTC if it is installed, or else nvcc. Raises CompilerMissing."""
    nvrtc = find_nvrtc()
    if nvrtc is not None:
        return nvrtc
    toolkit = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(toolkit) / "bin"))
    if nvcc is not None:
        return Nvcc(nvcc)
    raise CompilerMissing(
        'the plugins need a CUDA compiler, and there is none: pip install "nvidia-cuda-nvrtc>=13.0,<13.1"'
        " (nvidia-cuda-nvrtc-cu12 for a driver of CUDA 12)"
    )


def target_for(major: int, minor: int) -> str:
    """The target whose PTX runs on compute capability `major.minor`. Raises TargetError for GPUs before Turing."""
    fitting = [target for target in TARGETS if int(target.removeprefix("sm_")) <= 10 * major + minor]
    if not fitting:
        raise TargetError(f"compute capability {major}.{minor} is too old for the plugins: they need 7.5 or newer")
    return fitting[-1]


def check_driver(compiler: Compiler, driver: int) -> None:
    """Raises DriverTooOld where PTX of `compiler` is too new for a driver of CUDA `driver` (13000 is 13.0)."""
    major, minor = driver // 1000, driver % 1000 // 10
    parts = compiler.version.split(".")
    if all(part.isdigit() for part in parts) and tuple(map(int, parts)) > (major, minor):
        package = "nvidia-cuda-nvrtc" if major >= 13 else f"nvidia-cuda-nvrtc-cu{major}"
        raise DriverTooOld(
            f"the driver is of CUDA {major}.{minor} and cannot load what {compiler.name} of CUDA {compiler.version}"
            f' compiles: update the driver, or pip install "{package}=={major}.{minor}.*"'
        )


def compiled(op: Op, element: Element, target: str, form: Form = "ptx") -> bytes:
    """The kernel of `op` for `element` on `target`, from the cache where it is there.

    Raises TargetError, CompilerMissing or CompileError.
    """
    if target not in TARGETS:
        raise TargetError(f"the plugins are compiled for {', '.join(TARGETS)}, not for {target}")
    compiler = find_compiler()
    source = SOURCE.read_text(encoding="utf-8")
    options = ["--std=c++17", *(f"-D{name}={value}" for name, value in defines(op, element).items())]
    key = "\0".join([compiler.name, compiler.version, target, form, *options, source])
    cached = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.{form}"
    if cached.is_file():
        return cached.read_bytes()
    code, _ = compiler.compile(source, target, options, form)
    # A cache that cannot be written costs time and nothing else.
    with suppress(OSError):
        _write(cached, code)
    return code


def cache_folder() -> Path:
    """Where compiled kernels are kept, under the hash of all that they depend on."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "svcli" / "kernels"


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, also where two processes write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
