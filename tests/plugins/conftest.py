"""Where kernels run in tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from svcli_engines.plugins.nvrtc import Nvrtc, find_nvrtc
from tests.optional import missing
from tests.plugins.cpu_device import CpuDevice, host_compiler


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
