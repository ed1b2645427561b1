"""NVRTC, CUDA's compiler as a library, through ctypes. It needs no GPU, no driver and no headers."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Form = Literal["ptx", "cubin"]

_SUCCESS = 0
_FOLDERS = ("nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib")
"""Where the packages for CUDA 13 and for CUDA 12 put it, below site-packages."""


class CompileError(ValueError):
    """The CUDA source was refused; the message is the compiler's."""


@dataclass(frozen=True)
class Nvrtc:
    """A loaded library."""

    path: str
    functions: ctypes.CDLL

    @property
    def name(self) -> str:
        return "nvrtc"

    @property
    def version(self) -> str:
        """Of CUDA, such as `13.0`."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def compile(self, source: str, target: str, options: Sequence[str], form: Form) -> tuple[bytes, str]:
        """`source` as PTX or cubin for `target`, such as `sm_90`, and what the compiler had to say.

        Raises CompileError with the compiler's messages.
        """
        # Only the cubin of a real architecture is assembled; PTX is for all from `target` on.
        architecture = target if form == "cubin" else target.replace("sm_", "compute_")
        encoded = [option.encode() for option in (*options, f"--gpu-architecture={architecture}")]
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
        try:
            status = self.functions.nvrtcCompileProgram(
                program, ctypes.c_int(len(encoded)), (ctypes.c_char_p * len(encoded))(*encoded)
            )
            log = self._text("nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
            if status != _SUCCESS:
                raise CompileError(f"NVRTC refused kernels.cu for {target}: {log or self._reason(status)}")
            if form == "ptx":
                return self._text("nvrtcGetPTX", program).rstrip(b"\0"), log
            return self._text("nvrtcGetCUBIN", program), log
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _text(self, getter: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{getter}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(getter, program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self.functions, function)(*arguments)
        if status != _SUCCESS:
            raise CompileError(f"{function} failed: {self._reason(status)}")

    def _reason(self, status: int) -> str:
        describe: Callable[[int], bytes] = self.functions.nvrtcGetErrorString
        self.functions.nvrtcGetErrorString.restype = ctypes.c_char_p
        return describe(status).decode()


def find_nvrtc() -> Nvrtc | None:
    """The library of an installed package, or else that of the system; None where there is neither."""
    for folder in _package_folders():
        for path in sorted(folder.glob("libnvrtc.so*"), reverse=True):
            # The library looks for its builtins by name, in places that do not hold those of a package.
            for builtins in folder.glob("libnvrtc-builtins.so*"):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return Nvrtc(str(path), ctypes.CDLL(str(path)))
    return next(filter(None, map(_of_the_system, ("libnvrtc.so.13", "libnvrtc.so.12"))), None)


def _of_the_system(name: str) -> Nvrtc | None:
    try:
        return Nvrtc(name, ctypes.CDLL(name))
    except OSError:
        return None


def _package_folders() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else [Path(each).parent for each in spec.submodule_search_locations or ()]
    return [root / folder for root in roots for folder in _FOLDERS if (root / folder).is_dir()]
