"""kernels.cu on the CPU, behind the same launch as on a GPU, with memory that nobody can overrun unnoticed."""

from __future__ import annotations

import copy
import ctypes
import mmap
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from svcli_engines.plugins.compile import SOURCE
from svcli_engines.plugins.launch import OPS, Element, Launch, PackedParameters, defines

MACHINE = Path(__file__).parent / "cuda_on_cpu.cpp"
GLUE = Path(__file__).parent / "kernels_on_cpu.cpp"
Side = Literal["start", "end"]

_WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")  # pragma unroll
_OPTIONS = ("-std=c++17", "-O1", "-fPIC", "-ffp-contract=off")
_SANITIZER = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
"""Misaligned accesses and overflows become a signal; it needs no library."""
_PAGE = mmap.PAGESIZE
_NO_ACCESS = 0


class KernelFault(AssertionError):
    """What a GPU would have answered with an error, a hang or silent damage."""


def host_compiler() -> str | None:
    """Path of a C++ compiler."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


class CpuDevice:
    """Compiles the kernels once for each element type, and launches them."""

    def __init__(self, compiler: str, folder: Path) -> None:
        """`folder` takes what is compiled."""
        self._compiler = compiler
        self._folder = folder
        self._machine = folder / "machine.o"
        self._source = SOURCE
        self._warnings: tuple[str, ...] = _WARNINGS
        self._libraries: dict[Element, ctypes.CDLL] = {}
        self._compile(*_WARNINGS, "-c", "-o", str(self._machine), str(MACHINE))

    def with_source(self, source: Path) -> CpuDevice:
        """The same for other kernels, which may leave parameters unused; compiled next to the source."""
        other = copy.copy(self)
        other._folder, other._source, other._warnings, other._libraries = source.parent, source, (), {}
        return other

    def launch(
        self, launch: Launch, element: Element, inputs: Sequence[Tensor], output: Tensor, *, seed: int = 0
    ) -> None:
        """Raises KernelFault, also where an element of `output`, all poison before, was not written."""
        parameters = PackedParameters(launch, [each.data_ptr() for each in inputs], output.data_ptr())
        self.launch_packed(launch.entry, launch.grid, launch.block, parameters.address, element, seed)
        if _is_poison(output).any():
            raise KernelFault("not every element of the output was written")

    def launch_packed(
        self, entry: str, grid: int, block: int, parameters: int, element: Element, seed: int = 0
    ) -> None:
        """As cuLaunchKernel: `parameters` is the address of the parameters' addresses. Raises KernelFault."""
        message = ctypes.create_string_buffer(200)
        failed = self._library(element).shim_launch(
            entry.encode(), grid, block, ctypes.c_void_p(parameters), seed, message
        )
        if failed:
            raise KernelFault(message.value.decode())

    def _library(self, element: Element) -> ctypes.CDLL:
        if element not in self._libraries:
            constants: dict[str, object] = {"KERNELS": f'"{self._source}"'}
            for op in OPS:
                constants |= defines(op, element)
            flags = [f"-D{name}={value}" for name, value in constants.items()]
            target = self._folder / f"{element}.so"
            inputs = (str(GLUE), str(self._machine))
            self._compile(*self._warnings, *_SANITIZER, *flags, "-shared", "-o", str(target), *inputs)
            self._libraries[element] = ctypes.CDLL(str(target))
        return self._libraries[element]

    def _compile(self, *arguments: str) -> None:
        done = subprocess.run([self._compiler, *_OPTIONS, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)


def guarded(shape: Sequence[int], dtype: torch.dtype, side: Side = "end", shift: int = 0) -> Tensor:
    """A tensor of poison (all bits set) that touches a page which cannot be accessed, at its start or its end.

    `shift` moves it away from there by that many elements.
    """
    numel = int(torch.Size(shape).numel())
    if numel == 0:
        return torch.empty(*shape, dtype=dtype)
    size = (numel + shift) * dtype.itemsize
    inner = -(-size // _PAGE) * _PAGE
    memory = mmap.mmap(-1, inner + 2 * _PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    ctypes.memset(start + _PAGE, 0xFF, inner)
    for page in (start, start + _PAGE + inner):
        assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(_PAGE), _NO_ACCESS) == 0
    offset = _PAGE + (shift * dtype.itemsize if side == "start" else inner - size)
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=offset).view(*shape)


def _is_poison(values: Tensor) -> Tensor:
    """Where all bits are set, as in memory that nobody has written."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    return values.view(bits) == -1
