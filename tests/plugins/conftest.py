"""What these tests may find missing, by hand: each skips what it carries, aloud, or fails where SVCLI_REQUIRE names it.

SVCLI_REQUIRE=compiler,nvrtc,tensorrt make test
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

from svcli_engines.plugins.nvrtc import Nvrtc, find_nvrtc
from tests.plugins.cpu_device import CpuDevice, host_compiler

OPTIONAL = {
    "compiler": "no C++ compiler (CXX, g++ or clang++): the kernels' arithmetic was not checked",
    "nvrtc": 'no NVRTC (pip install "nvidia-cuda-nvrtc>=13.0,<13.1"): no PTX was compiled',
    "tensorrt": (
        "SVCLI_TENSORRT_WHEELS is not set to a folder with tensorrt-cu13-bindings and tensorrt-lean-cu13-libs"
        " (pip install --no-deps --target FOLDER): registration was checked against the recorded interface only"
    ),
}


def missing(what: str) -> NoReturn:
    """Skips the test that needs `what`, or fails it."""
    required = {name for name in os.environ.get("SVCLI_REQUIRE", "").split(",") if name}
    known = {*OPTIONAL, "tensorrt-rtx"}  # the latter is asked for in tests/engines/test_build.py
    assert required <= known, f"SVCLI_REQUIRE knows {', '.join(sorted(known))}"
    if what in required:
        pytest.fail(f"required: {OPTIONAL[what]}")
    pytest.skip(OPTIONAL[what])


@pytest.fixture(scope="session")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> CpuDevice:
    compiler = host_compiler()
    if compiler is None:
        missing("compiler")
    return CpuDevice(compiler, tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session")
def nvrtc() -> Nvrtc:
    found = find_nvrtc()
    if found is None:
        missing("nvrtc")
    return found


@pytest.fixture(scope="session")
def tensorrt_wheels() -> Path:
    folder = os.environ.get("SVCLI_TENSORRT_WHEELS")
    if not folder:
        missing("tensorrt")
    return Path(folder)
