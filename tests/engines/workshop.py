"""A builder of plans that only writes its name: what decides, records and shows is the real thing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import onnx
import pytest

from svcli_engines import build as build_module
from svcli_engines.build_options import LocalGpu
from svcli_engines.builder_process import Built, Job, Progress, Task, Tools
from svcli_engines.plans import Backend

VERSION = "1.7.1"
HERE = LocalGpu("sm_89", None, 13000)
NOWHERE = LocalGpu(None, "libcuda.so.1 is not there", None)
SPLIT = ["vision.plan", "prefill.plan", "decode.plan"]
SHARED = ["vision.plan", "decoder.plan"]


@dataclass
class Workshop:
    """Stands for the builder's process: what it was asked, and what it does instead."""

    gpu: LocalGpu = NOWHERE
    version: str = VERSION
    jobs: list[Job] = field(default_factory=list)
    fails: dict[str, BaseException] = field(default_factory=dict)
    """By plan."""

    def find_tools(self, backend: Backend, driver: int | None) -> Tools:
        assert driver == self.gpu.driver
        return Tools(version=self.version, targets=("sm_80", "sm_89", "sm_120") if backend == "tensorrt-rtx" else ())

    def build(self, task: Task, log: Path, progress: Progress) -> Built:
        job = task.job
        assert job is not None
        assert job.graph.parent.samefile(log.parents[1]), "the graph lies beside the weights"
        onnx.load(str(job.graph))  # weights included
        self.jobs.append(job)
        with log.open("a") as file:
            file.write(f"{job.plan.name}\n")
        progress(0.5)
        if job.plan.name in self.fails:
            raise self.fails[job.plan.name]
        job.plan.write_text(f"{job.plan.name} number {len(self.jobs)}")
        return Built(version=self.version, num_layers=7, scratch_bytes=None, seconds=1.0)

    def taken(self) -> list[str]:
        """Plans that were built since this was last asked."""
        names = [job.plan.name for job in self.jobs]
        self.jobs.clear()
        return names


def open_workshop(monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """Puts one in place of the builder's process, and of the GPU."""
    shop = Workshop()
    monkeypatch.setattr(build_module, "find_gpu", lambda: shop.gpu)
    monkeypatch.setattr(build_module, "find_tools", shop.find_tools)
    monkeypatch.setattr(build_module, "build", shop.build)
    return shop
