"""polygraphy and TensorRT as far as plan_builder.py knows them, in one module that imports nothing heavy.

A plan of theirs says what was asked for. `SVCLI_FAULT` in the environment names what goes wrong.
"""

from __future__ import annotations

import enum
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VERSION = "1.7.1"
SCRATCH = 4096
NUM_STEPS = 4

_IMPORT_ALL = "from tests.engines.fake_builder import *\n"
FILES = {
    "tensorrt_rtx.py": f"{_IMPORT_ALL}from tests.engines.fake_builder import VERSION as __version__\n",
    "polygraphy/__init__.py": "",
    "polygraphy/logger.py": _IMPORT_ALL,
    "polygraphy/exception.py": _IMPORT_ALL,
    "polygraphy/backend/__init__.py": "",
    "polygraphy/backend/trt.py": _IMPORT_ALL,
    "polygraphy/backend/tensorrt_rtx.py": _IMPORT_ALL,
}
"""The packages by the names that they are imported by."""

plugin_layers = 0
"""Of every network; for tests in this process."""


class ComputeCapability(enum.Enum):
    NONE = 0
    SM80 = 80
    SM89 = 89
    SM120 = 120
    CURRENT = -1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class BuilderFlag(enum.Enum):
    REQUIRE_USER_ALLOCATION = 20


class PolygraphyException(Exception):
    pass


class IProgressMonitor:
    """What TensorRT would call."""

    phase_start: Callable[[str, str | None, int], None]
    step_complete: Callable[[str, int], bool]
    phase_finish: Callable[[str], None]


class Logger:
    VERBOSE = 10
    colors = True
    module_severity = 20


G_LOGGER = Logger()


class Profile(dict[str, Any]):
    def add(self, name: str, smallest: Any, usual: Any, largest: Any) -> None:
        self[name] = [list(smallest), list(usual), list(largest)]


class Network:
    def __init__(self, data: bytes) -> None:
        kind = "SCATTER" if fault() == "scatter" else "KV_CACHE_UPDATE"
        self.layers = [kind] * data.count(b"TensorScatter") + ["PLUGIN_V3"] * plugin_layers + ["SHUFFLE"]
        self.num_layers = len(self.layers)
        self.decomposable = False

    def get_layer(self, number: int) -> Any:
        return SimpleNamespace(type=SimpleNamespace(name=self.layers[number]))


class NetworkFromOnnxPath:
    def __init__(self, path: str, strongly_typed: bool = False) -> None:
        self.path = Path(path)
        assert strongly_typed

    def __call__(self) -> tuple[Any, Network, Any]:
        sys.stdout.write(f"[V] parsing {self.path.name}\n")
        assert (self.path.parent / "weights.safetensors").is_file(), "external weights lie beside the graph"
        return self.path, Network(self.path.read_bytes()), "parser"


class SetDecomposableAttentions:
    def __init__(self, network: tuple[Any, Network, Any]) -> None:
        self.network = network

    def __call__(self) -> tuple[Any, Network, Any]:
        self.network[1].decomposable = True
        return self.network


class CreateConfig:
    def __init__(self, **options: Any) -> None:
        self.options = options
        self.flags: list[str] = []

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.append(flag.name)


class CreateConfigRTX(CreateConfig):
    pass


def PostprocessConfig(config: CreateConfig, change: Callable[[Any, Any, CreateConfig], None]) -> CreateConfig:
    change(None, None, config)
    return config


class EngineBytesFromNetwork:
    def __init__(self, network: tuple[Any, Network, Any], config: CreateConfig, save_timing_cache: str | None) -> None:
        self.network, self.config, self.timing_cache = network, config, save_timing_cache

    def __call__(self) -> bytes:
        strike()
        options = dict(self.config.options)
        monitor, limits = options.pop("progress_monitor"), options.pop("memory_pool_limits") or {}
        monitor.phase_start("Building", None, NUM_STEPS)
        for step in range(NUM_STEPS):
            assert monitor.step_complete("Building", step)
        monitor.phase_finish("Building")
        if self.timing_cache is not None:
            Path(self.timing_cache).write_bytes(b"timings")
        asked = {
            "graph": self.network[0].name,
            "config": type(self.config).__name__,
            "rtx": os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX"),
            "limits": {pool.name: limit for pool, limit in limits.items()},
            "timing_cache": self.timing_cache,
            "flags": self.config.flags,
            "decomposable": self.network[1].decomposable,
            **options,
        }
        return json.dumps(asked).encode()


class EngineFromBytes:
    def __init__(self, plan: bytes) -> None:
        assert json.loads(plan)
        self.device_memory_size_v2 = SCRATCH

    def __call__(self) -> EngineFromBytes:
        return self

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return None if fault() == "copy" else name.replace("present.", "past_key_values.")


def fault() -> str:
    return os.environ.get("SVCLI_FAULT", "")


def strike() -> None:
    """What may happen in the middle of a build."""
    words = {
        "refuse": "Error Code 10: could not find any implementation for node attention",
        "memory": "Error Code 2: OutOfMemory (Requested size was 123 bytes.)",
        "driver": "CUDA initialization failure with error: 35",
    }
    if fault() in words:
        sys.stdout.write(f"[V] a line before\n[E] {words[fault()]}\n[E] something that follows from it\n")
        raise PolygraphyException("Invalid Engine. Please ensure the engine was built correctly\nmore")
    if fault() == "abort":
        os.write(2, b"printed past every logger\nterminate called after an assertion\n")
        os.abort()
    if fault() == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault() == "disk":
        raise OSError(28, "No space left on device")
    if fault() == "exit":
        os._exit(0)
